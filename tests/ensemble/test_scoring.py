import pytest
import torch
from families import agents_of, of_family
from stock import make_lively, stock_model
from torch import Tensor
from toy import toy_agents, toy_samples

from chorus.data.batches import Sample
from chorus.ensemble.scoring import Choices, choice_log_probs, token_log_probs
from chorus.errors import InputError
from chorus.model.agents import Agents, Mode

MEMBERS = (1, None, 0, 2)


ALPHAS = [6.0, 15.0, 2.0]  # the agents differ in their scaling, too


@pytest.fixture(scope="module", params=["fused", "parallel"])
def agents(request: pytest.FixtureRequest) -> Agents:
    mode: Mode = request.param
    agents = toy_agents(mode, alpha=ALPHAS).eval()
    make_lively(agents.frozen_tensors())
    return agents


@torch.no_grad()
def stock_log_probs(agents: Agents, member: int | None, ids: list[int]) -> Tensor:
    """Of each token after the first, by stock PEFT and transformers."""
    model = stock_model(agents, member, alpha=ALPHAS[member or 0])
    log_prob_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return log_prob_TV[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]


@pytest.mark.parametrize("tokens_per_pass", [1, 100, 10_000])
def test_target_tokens_of_rows_of_all_lengths_have_stock_pefts_log_probabilities(
    agents: Agents, tokens_per_pass: int
):
    samples = toy_samples(7)
    found = token_log_probs(agents, MEMBERS, samples, tokens_per_pass)
    for sample, log_prob_MT in zip(samples, found, strict=True):
        for member, own_T in zip(MEMBERS, log_prob_MT, strict=True):
            expected_T = stock_log_probs(agents, member, sample.ids.tolist())[sample.is_target[1:]]
            torch.testing.assert_close(own_T, expected_T, atol=2e-5, rtol=1e-5)


def test_choices_have_the_sum_of_their_tokens_log_probabilities(agents: Agents):
    """Of one token and of several, some the beginning of others, of questions of different lengths."""
    questions = [
        Choices([5, 6, 7], [[8], [9], [9, 10], [9, 10, 3], [11, 4], [9, 12]]),
        Choices([3], [[4], [5], [4]]),
        Choices([7] * 9, [[3, 4, 5, 6]]),
    ]
    for question, log_prob_MC in zip(
        questions, choice_log_probs(agents, MEMBERS, questions, 60), strict=True
    ):
        for member, own_C in zip(MEMBERS, log_prob_MC, strict=True):
            for ids, total in zip(question.choice_ids, own_C.tolist(), strict=True):
                text = [*question.prompt_ids, *ids]
                expected = float(stock_log_probs(agents, member, text)[len(question.prompt_ids) - 1 :].sum())
                assert total == pytest.approx(expected, abs=1e-4)


def test_rows_reach_the_last_learned_position_and_longer_ones_are_refused():
    """The last token of a row is never read: 64 positions are enough for 65 tokens."""
    agents = agents_of("gpt2").eval()
    question = Choices([3 + n % 20 for n in range(60)], [[8, 9, 10, 11, 12], [8]])
    (log_prob_MC,) = choice_log_probs(agents, [None], [question])
    ids = torch.tensor([[*question.prompt_ids, *question.choice_ids[0]]])
    log_prob_TV = of_family("gpt2")(input_ids=ids[:, :-1]).logits[0, 59:].log_softmax(-1)
    expected = log_prob_TV.gather(1, ids[0, 60:, None]).sum()
    torch.testing.assert_close(log_prob_MC[0, 0], expected, atol=1e-4, rtol=1e-5)
    longer = Choices([3, *question.prompt_ids], question.choice_ids)
    with pytest.raises(InputError, match=r"has 65 tokens, .*the base has 64 positions"):
        choice_log_probs(agents, [None], [question, longer])
    row = Sample(torch.full((66,), 5), torch.ones(66, dtype=torch.bool))
    assert len(token_log_probs(agents, [None], [Sample(row.ids[:65], row.is_target[:65])])[0][0]) == 64
    with pytest.raises(InputError, match="has 65 tokens"):
        token_log_probs(agents, [None], [row])


def test_a_question_whose_choices_are_one_token_each_costs_one_row(agents: Agents):
    rows: list[int] = []
    layer = agents.peft_models[0].get_base_model().get_input_embeddings()
    counter = layer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    choice_log_probs(agents, [0], [Choices([5, 6], [[token] for token in range(3, 40)])])
    counter.remove()
    assert rows == [1]
