"""Scores of every answerer against stock PEFT models that answer one problem after the other."""

import math
import random
from typing import Any

import pytest
import torch
from stock_answers import (
    BASE,
    MAX_NEW_TOKENS,
    MEMBERS,
    NUM_AGENTS,
    PROMPTS,
    SHAPE,
    held_out,
    stock_model,
    stock_nll_N,
    stock_text,
)
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from chorus.config import Config
from chorus.data.templates import Problem
from chorus.ensemble.evaluate import Evaluation, evaluate
from chorus.ensemble.evaluation_rows import divided
from chorus.ensemble.mixture import dirichlet_weights
from chorus.model.agents import Agents, Regularisation, build_agents
from chorus.model.base import load_model, load_tokenizer
from chorus.model.execution import Execution


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(BASE)


@pytest.fixture(scope="module")
def agents() -> Agents:
    """Agents that differ, with noise rates that would change every number were they not off in evaluation."""
    base = load_model(BASE, torch.float32, torch.device("cpu"))
    agents = build_agents(
        "sequential", base, NUM_AGENTS, SHAPE, Regularisation(dropconnect_p=0.5, dropout_p=0.5, seed=1)
    )
    for tensor in agents.adapter_tensors().values():
        tensor.data *= 8
    return agents


@pytest.fixture(scope="module")
def stock_models(agents: Agents) -> list[Any]:
    """The base and, over bases of their own, stock PEFT models with the agents' weights copied in."""
    return [stock_model(agents, member) for member in MEMBERS]


@pytest.fixture(scope="module")
def problems(stock_models: list[Any], tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """The answers are what one member after the other writes, so that each is right about some problems."""
    members = [MEMBERS[number % len(MEMBERS)] for number in range(len(PROMPTS))]
    return [
        Problem(prompt, stock_text(stock_models[MEMBERS.index(member)], tokenizer, prompt))
        for prompt, member in zip(PROMPTS, members, strict=True)
    ]


def settings(**keys: Any) -> Config:
    return Config(
        max_new_tokens_eval=MAX_NEW_TOKENS, **{"calibration_split": 0.0, "eval_choices": False, **keys}
    )


def scored_by(
    agents: Agents,
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerBase,
    alpha: float | None = None,
    **keys: Any,
) -> Evaluation:
    config = settings(**keys)
    return evaluate(
        agents, divided(held_out(problems, tokenizer), [], tokenizer, config, 0), config, 0, alpha=alpha
    )


def names(suffix: str = "") -> list[str]:
    return ["base" + suffix, *(f"agent_{agent}{suffix}" for agent in range(NUM_AGENTS))]


# ---- scores ----


def test_the_nll_of_every_answerer_is_the_cross_entropy_of_stock_models(
    agents: Agents, stock_models: list[Any], problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    nll_MN = torch.stack([stock_nll_N(model, tokenizer, problems) for model in stock_models]).double()
    found = scored_by(agents, problems, tokenizer)
    own = [found.scores[name]["token/NLL"] for name in names()]
    assert own == pytest.approx(nll_MN.mean(1).tolist(), rel=1e-4)
    mixture = -nll_MN[1:].neg().exp().mean(0).log().mean().item()
    assert found.scores["uniform"]["token/NLL"] == pytest.approx(mixture, rel=1e-4)
    assert found.scores["uniform"]["token/perplexity"] == pytest.approx(math.exp(mixture), rel=1e-4)
    assert found.scores["uniform"]["ens/Ambiguity"] == pytest.approx(
        nll_MN[1:].mean().item() - mixture, rel=1e-3
    )
    assert found.scores["base"]["cls/NLL"] == pytest.approx(nll_MN[0].sum().item() / len(problems), rel=1e-4)
    assert found.num_problems == len(problems)


def test_the_exact_matches_of_every_answerer_are_those_of_stock_greedy_text(
    agents: Agents, stock_models: list[Any], problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    found = scored_by(agents, problems, tokenizer)
    for name, model in zip(names(), stock_models, strict=True):
        texts = [stock_text(model, tokenizer, problem.prompt) for problem in problems]
        assert [one["answers"][name]["text"].split() for one in found.problems] == [
            text.split() for text in texts
        ]
        right = [text.split() == one.completion.split() for text, one in zip(texts, problems, strict=True)]
        assert [one["answers"][name]["right"] for one in found.problems] == right
        assert found.scores[name]["cls/Acc"] == sum(right) / len(right)
    assert any(0 < found.scores[name]["cls/Acc"] < 1 for name in names())


def test_a_mixtures_tokens_make_its_answer_and_its_probability(
    agents: Agents, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    for one in scored_by(agents, problems, tokenizer).problems:
        own = one["answers"]["uniform"]
        assert "".join(own["tokens"]["text"]) == own["text"]
        assert math.prod(own["tokens"]["probability"]) == pytest.approx(own["probability"], rel=1e-3)
        counts = {len(column) for column in own["tokens"].values()}
        assert len(counts) == 1
        mean = sum(own["tokens"]["mutual_information"]) / counts.pop()
        assert mean == pytest.approx(own["uncertainty"]["mutual_information"], rel=1e-3, abs=1e-6)
        assert "tokens" not in one["answers"]["agent_0"]


def test_the_probability_of_an_answer_is_the_product_over_its_tokens(
    agents: Agents, stock_models: list[Any], problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    found = scored_by(agents, problems, tokenizer)
    for name, model in zip(names(), stock_models, strict=True):
        for problem, one in zip(problems, found.problems, strict=True):
            ids = tokenizer(problem.prompt)["input_ids"]
            written = model.generate(
                torch.tensor([ids]),
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=1,
                pad_token_id=0,
            )[0]
            with torch.no_grad():
                log_prob_TV = model(written[None, :-1]).logits[0].double().log_softmax(-1)
            own = log_prob_TV.gather(1, written[1:, None])[len(ids) - 1 :].sum()
            assert math.log(one["answers"][name]["probability"]) == pytest.approx(float(own), rel=1e-4)


def test_equal_members_make_a_mixture_like_each_of_them(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    base = load_model(BASE, torch.float32, torch.device("cpu"))
    found = scored_by(build_agents("fused", base, 2, SHAPE, Regularisation(0, 0, 0)), problems, tokenizer)
    base = load_model(BASE, torch.float32, torch.device("cpu"))
    equal = build_agents("fused", base, 2, SHAPE, Regularisation(0, 0, 0))
    first, second = equal.adapters().values()
    second.data.copy_(first.data)
    same = scored_by(equal, problems, tokenizer).scores["uniform"]
    assert same["ens/Ambiguity"] == pytest.approx(0, abs=1e-5)
    assert (same["ens/Disagreement"], same["sc/AUROC/disagreement"]) in [
        (0, 0.5),
        (0, pytest.approx(math.nan, nan_ok=True)),
    ]
    assert same["ens/MutualInformation"] == pytest.approx(0, abs=1e-5)
    assert found.scores["uniform"]["ens/Ambiguity"] > 1e-4


# ---- calibration ----


def test_the_weights_are_fitted_to_the_calibration_rows_alone(
    agents: Agents, stock_models: list[Any], problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    many = [*problems, *(Problem(one.prompt + " So", one.completion) for one in problems)]
    config = settings(calibration_split=0.4, dirichlet_alpha_aggregator=0.5)
    rows = divided(held_out(many, tokenizer), [], tokenizer, config, seed=3)
    assert (len(rows.scored), len(rows.calibration)) == (6, 4)
    kept = [tokenizer.decode(row.prompt, skip_special_tokens=True) for row in rows.calibration]
    fitted_to = [one for one in many if one.prompt in kept]
    nll_KN = [torch.stack([stock_nll_N(m, tokenizer, [one]) for m in stock_models[1:]]) for one in fitted_to]
    for observations, log_prob_KN in (
        ("token", -torch.cat(nll_KN, 1)),
        ("sequence", -torch.stack([nll.sum(1) for nll in nll_KN], 1)),
    ):
        found = evaluate(agents, rows, settings(mixture_observations=observations), 0, alpha=0.5)
        expected = dirichlet_weights(log_prob_KN, 0.5)
        assert expected.max() - expected.min() > 0.05, "even weights would prove little"
        assert found.mixture is not None
        assert found.mixture.weights == pytest.approx(expected.tolist(), abs=2e-3)


def test_a_temperature_of_its_own_lowers_the_nll_of_the_rows_that_it_is_fitted_to(
    agents: Agents, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    config = settings(calibration_split=0.5)
    rows = divided(held_out(problems, tokenizer), [], tokenizer, config, 0)
    found = evaluate(agents, rows._replace(scored=rows.calibration), config, 0)
    for name in [*names(), "uniform"]:
        plain, own = found.scores[name], found.scores[f"{name}/calibrated"]
        assert own["token/NLL"] < plain["token/NLL"]
        assert own["cls/Acc"] == plain["cls/Acc"]
        assert found.temperatures[name] != 1
    assert found.mixture is not None
    assert found.mixture.temperature == found.temperatures["uniform"]


# ---- choices ----


def test_a_choice_is_the_most_probable_of_all_answers(
    agents: Agents, stock_models: list[Any], tokenizer: PreTrainedTokenizerBase
):
    labels = [" apples", " a number", " 19"]
    asked = [Problem(prompt, labels[number % 3]) for number, prompt in enumerate(PROMPTS)]
    found = scored_by(agents, asked, tokenizer, eval_choices=True)
    assert found.is_choice
    choices = sorted(set(labels))
    log_prob_MNC = torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            -stock_nll_N(model, tokenizer, [Problem(one.prompt, label)]).sum()
                            for label in choices
                        ]
                    )
                    for one in asked
                ]
            )
            for model in stock_models
        ]
    ).log_softmax(-1)
    right_N = torch.tensor([choices.index(one.completion) for one in asked])
    for name, log_prob_NC in zip(names(), log_prob_MNC, strict=True):
        assert found.scores[name]["cls/Acc"] == pytest.approx(
            float((log_prob_NC.argmax(-1) == right_N).float().mean())
        )
        nll = float(cross_entropy(log_prob_NC, right_N))
        assert found.scores[name]["cls/NLL"] == pytest.approx(nll, rel=1e-3)
        one_hot_NC = torch.nn.functional.one_hot(right_N, 3)
        brier = float((log_prob_NC.exp() - one_hot_NC).square().sum(-1).mean())
        assert found.scores[name]["cls/Brier"] == pytest.approx(brier, rel=1e-3, abs=1e-6)
    pooled_NC = log_prob_MNC[1:].exp().mean(0)
    assert found.scores["uniform"]["cls/NLL"] == pytest.approx(
        float(-pooled_NC[range(5), right_N].log().mean()), rel=1e-3
    )


# ---- out of distribution ----


def test_a_second_data_set_is_told_by_uncertainty(
    agents: Agents, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    config, rows = settings(), held_out(problems, tokenizer)
    same = evaluate(agents, divided(rows, rows.rows, tokenizer, config, 0), config, 0)
    assert same.num_ood == len(problems)
    for name in ("base", "agent_0", "uniform"):
        assert same.scores[name]["ood/AUROC/entropy"] == 0.5
    assert "ood/AUROC/mutual_information" in same.scores["uniform"]
    assert "ood/AUROC/mutual_information" not in same.scores["agent_0"]


# ---- what it leaves, and what it needs ----


def test_agents_that_are_trained_with_gradient_checkpointing_score_the_same(
    agents: Agents, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    """In training mode the layers of transformers would leave the key-value cache empty."""
    base = load_model(BASE, torch.float32, torch.device("cpu"))
    checkpointing = build_agents(
        "parallel", base, NUM_AGENTS, SHAPE, Regularisation(0.5, 0.5, 1), Execution(recompute="full")
    )
    for identity, tensor in checkpointing.adapter_tensors().items():
        tensor.data.copy_(agents.adapter_tensors()[identity])
    assert checkpointing.training
    found, expected = (scored_by(one, problems, tokenizer).scores for one in (checkpointing, agents))
    for name in found:
        assert found[name]["cls/Acc"] == expected[name]["cls/Acc"]
        assert found[name]["token/NLL"] == pytest.approx(expected[name]["token/NLL"], rel=1e-4)


def test_evaluation_leaves_no_trace(
    agents: Agents, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    for training in (True, False):
        agents.train(training)
        values = {name: tensor.clone() for name, tensor in agents.state_dict().items()}
        modes = [module.training for module in agents.modules()]
        flags = [parameter.requires_grad for parameter in agents.parameters()]
        states, turn = (torch.random.get_rng_state(), random.getstate()), agents.router.context
        scored_by(agents, problems[:2], tokenizer, alpha=1.0, calibration_split=0.5)
        assert all(torch.equal(values[name], tensor) for name, tensor in agents.state_dict().items())
        assert modes == [module.training for module in agents.modules()]
        assert flags == [parameter.requires_grad for parameter in agents.parameters()]
        assert torch.equal(states[0], torch.random.get_rng_state())
        assert states[1] == random.getstate()
        assert turn == agents.router.context
        assert torch.is_grad_enabled()
        assert all(parameter.grad is None for parameter in agents.parameters())


def test_no_problem_is_no_score_and_no_error(agents: Agents, tokenizer: PreTrainedTokenizerBase):
    found = scored_by(agents, [], tokenizer, alpha=0.5)
    assert (found.num_problems, found.report(), found.flat()) == (0, {}, {})


def test_a_report_comes_back_with_its_scores(
    agents: Agents, problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    found = scored_by(agents, problems, tokenizer)
    again = Evaluation.from_report(found.report())
    assert again.flat() == pytest.approx(found.flat(), nan_ok=True)
    assert again.report()["scores"] == found.report()["scores"]
