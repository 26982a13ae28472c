import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rows
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from chorus.data.templates import Problem
from chorus.ensemble import evaluate as evaluate_module
from chorus.ensemble.evaluate import Evaluation, HeldOut, Score, evaluate, held_out_share
from chorus.ensemble.generate import generate
from chorus.ensemble.mixture import dirichlet_weights
from chorus.model.adapters import LoraShape
from chorus.model.agents import Agents, Regularisation, build_agents
from chorus.model.base import load_model, load_tokenizer
from chorus.model.execution import Execution

BASE = str(Path(__file__).parents[2] / "assets" / "tiny-gemma-2")
SHAPE = LoraShape(4, 8.0, ("q_proj", "o_proj", "gate_proj", "down_proj"), random_init=True, seed=5)
NUM_AGENTS = 3
MEMBERS = (None, *range(NUM_AGENTS))
MAX_NEW_TOKENS = 8
PROMPTS = (
    "Question: Ada has 12 apples. Ben gives Ada 7 more. How many apples does Ada have now?\nAnswer:",
    "Question: 3 + 4?\nAnswer:",
    "A story of one line.\n",
    "There are 9 shelves, and each shelf holds 4 coins. How many coins are on the shelves?\nAnswer:",
    "Two and two make",
)


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


def stock_model(agents: Agents, member: int | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    if member is None:
        return base.eval()
    config = LoraConfig(
        r=SHAPE.rank, lora_alpha=int(SHAPE.alpha), target_modules=list(SHAPE.target_modules), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    parameters = dict(model.named_parameters())
    for identity, tensor in agents.adapter_tensors().items():
        if identity.agent == member:
            parameters[f"{identity.path}.lora_{identity.matrix}.default.weight"].data.copy_(tensor)
    return model.eval()


def stock_text(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(
        **inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def stock_nll_N(model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> Tensor:
    """Cross-entropy of completion and end token under the model's own logits, one unpadded row after another."""
    parts = []
    for prompt, completion, *_ in problems:
        encoding = tokenizer(prompt + completion, return_offsets_mapping=True)
        ids = [*encoding["input_ids"], tokenizer.eos_token_id]
        starts = [start for start, end in encoding["offset_mapping"] if end > start >= len(prompt)]
        num_targets = len(starts) + 1
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        parts.append(cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="none")[-num_targets:])
    return torch.cat(parts)


def held_out_of(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, process_index: int = 0, num_processes: int = 1
) -> HeldOut:
    return held_out_share(
        rows.held_out_of(problems, tokenizer),
        tokenizer,
        batch_size=2,
        max_new_tokens=MAX_NEW_TOKENS,
        process_index=process_index,
        num_processes=num_processes,
    )


# ---- scores ----


def test_the_nll_of_every_answerer_is_the_cross_entropy_of_stock_models(
    agents: Agents, stock_models: list[Any], problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    nll_MN = torch.stack([stock_nll_N(model, tokenizer, problems) for model in stock_models]).double()
    result = evaluate(agents, held_out_of(problems, tokenizer), alpha=None)
    own = [result.base.nll, *(score.nll for score in result.agents)]
    assert own == pytest.approx(nll_MN.mean(1).tolist(), rel=1e-4)
    assert result.mixture.nll == pytest.approx(-nll_MN[1:].neg().exp().mean(0).log().mean().item(), rel=1e-4)
    assert result.weights == pytest.approx([1 / NUM_AGENTS] * NUM_AGENTS)
    assert result.num_problems == len(problems)


def test_a_fitted_mixture_has_the_weights_of_the_held_out_tokens(
    agents: Agents, stock_models: list[Any], problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    nll_KN = torch.stack([stock_nll_N(model, tokenizer, problems) for model in stock_models[1:]]).double()
    weight_K = dirichlet_weights(-nll_KN, 0.5).double()
    assert weight_K.max() - weight_K.min() > 0.05, "even weights would prove little"
    result = evaluate(agents, held_out_of(problems, tokenizer), alpha=0.5)
    assert result.weights == pytest.approx(weight_K.tolist(), abs=1e-3)
    assert result.mixture.nll == pytest.approx(-(weight_K @ nll_KN.neg().exp()).log().mean().item(), rel=1e-4)


def test_the_exact_matches_of_every_answerer_are_those_of_stock_greedy_text(
    agents: Agents, stock_models: list[Any], problems: list[Problem], tokenizer: PreTrainedTokenizerBase
):
    result = evaluate(agents, held_out_of(problems, tokenizer), alpha=None)
    expected = []
    for model in stock_models:
        texts = [stock_text(model, tokenizer, prompt) for prompt, *_ in problems]
        right = [text.split() == completion.split() for text, (_, completion, *_) in zip(texts, problems, strict=True)]
        expected.append(sum(right) / len(problems))
    assert [result.base.exact_match, *(score.exact_match for score in result.agents)] == expected
    assert any(0 < share < 1 for share in expected)


@pytest.mark.parametrize("weights", [[1 / 3, 1 / 3, 1 / 3], [0.02, 0.02, 0.96]])
def test_the_mixture_is_matched_by_its_own_text(
    agents: Agents, tokenizer: PreTrainedTokenizerBase, weights: list[float], monkeypatch: pytest.MonkeyPatch
):
    weight_K = torch.tensor(weights)
    monkeypatch.setattr(evaluate_module, "dirichlet_weights", lambda *_: weight_K)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    members = list(agents.agents)
    answers = generate(agents.eval(), members, weight_K, prompts, MAX_NEW_TOKENS, tokenizer.eos_token_id)
    own = [Problem(prompt, tokenizer.decode(answer)) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    own[1] = Problem(PROMPTS[1], "something else")
    result = evaluate(agents, held_out_of(own, tokenizer), alpha=1.0)
    assert result.mixture.exact_match == (len(own) - 1) / len(own)
    assert result.base.exact_match < result.mixture.exact_match
    even = evaluate(agents, held_out_of(own, tokenizer), alpha=None)
    assert (even.mixture.exact_match == result.mixture.exact_match) == (weights[0] == weights[1] == weights[2])


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
    found, expected = (evaluate(one, held_out_of(problems, tokenizer), None) for one in (checkpointing, agents))
    for one, other in zip(found.scores().values(), expected.scores().values(), strict=True):
        assert one.exact_match == other.exact_match
        assert one.nll == pytest.approx(other.nll, rel=1e-5)


def test_evaluation_leaves_no_trace(agents: Agents, problems: list[Problem], tokenizer: PreTrainedTokenizerBase):
    held_out = held_out_of(problems[:2], tokenizer)
    for training in (True, False):
        agents.train(training)
        values = {name: tensor.clone() for name, tensor in agents.state_dict().items()}
        modes = [module.training for module in agents.modules()]
        flags = [parameter.requires_grad for parameter in agents.parameters()]
        states, turn = (torch.random.get_rng_state(), random.getstate()), agents.router.turn
        evaluate(agents, held_out, alpha=1.0)
        assert all(torch.equal(values[name], tensor) for name, tensor in agents.state_dict().items())
        assert modes == [module.training for module in agents.modules()]
        assert flags == [parameter.requires_grad for parameter in agents.parameters()]
        assert torch.equal(states[0], torch.random.get_rng_state())
        assert states[1] == random.getstate()
        assert turn == agents.router.turn
        assert torch.is_grad_enabled()
        assert all(parameter.grad is None for parameter in agents.parameters())


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_no_problem_is_no_score_and_no_error(agents: Agents, tokenizer: PreTrainedTokenizerBase, alpha: float | None):
    result = evaluate(agents, held_out_of([], tokenizer), alpha)
    assert (result.num_problems, result.report()) == (0, {})
    assert result.weights == pytest.approx([1 / NUM_AGENTS] * NUM_AGENTS)


# ---- several processes ----


@pytest.mark.parametrize("num_processes", [1, 2, 4, 9])
def test_the_processes_share_the_problems_and_their_rows_without_overlap(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, num_processes: int
):
    whole = held_out_of(problems, tokenizer)
    shares = [held_out_of(problems, tokenizer, process, num_processes) for process in range(num_processes)]
    for part in (lambda row: row.prompt, lambda row: row.answer, lambda row: row.sample.ids.tolist()):
        assert sorted(part(row) for share in shares for row in share.rows) == sorted(part(row) for row in whole.rows)


def test_two_processes_score_what_one_scores(
    agents: Agents, problems: list[Problem], tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    """Process 1 computes first and its parts are kept; then process 0 gathers its own and those."""
    alone = evaluate(agents, held_out_of(problems, tokenizer), 0.5)
    kept: list[list[Any]] = []
    monkeypatch.setattr(evaluate_module, "gather_object", lambda own: kept.append(own) or own)
    evaluate(agents, held_out_of(problems, tokenizer, 1, 2), 0.5)
    parts: Iterator[list[Any]] = iter(kept)
    monkeypatch.setattr(evaluate_module, "gather_object", lambda own: own + next(parts))
    together = evaluate(agents, held_out_of(problems, tokenizer, 0, 2), 0.5)
    assert together.num_problems == alone.num_problems
    assert together.weights == pytest.approx(alone.weights, abs=1e-4)
    for one, other in zip(together.scores().values(), alone.scores().values(), strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-5)
    # Not the mixture: process 1 fitted its weights to its own rows alone here, and may answer otherwise.
    for one, other in zip([together.base, *together.agents], [alone.base, *alone.agents], strict=True):
        assert one.exact_match == other.exact_match


# ---- names ----


def test_every_answerer_is_named_and_reported():
    scores = [Score(0.1 * number, float(number)) for number in range(4)]
    fitted = Evaluation(scores[0], scores[1:3], scores[3], [0.25, 0.75], num_problems=10)
    assert fitted.scores() == dict(zip(["base", "agent 0", "agent 1", "mixture 0.25 0.75"], scores, strict=True))
    even = fitted._replace(weights=[0.5, 0.5])
    assert list(even.scores()) == ["base", "agent 0", "agent 1", "mean of agents"]
    assert fitted.report()["agent 1"] == {"exact_match": 0.2, "nll": 2.0}
    assert list(fitted.report()) == list(fitted.scores())
