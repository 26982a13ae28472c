from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from toy import ALPHA, RANK, TARGETS, VOCABULARY, tiny_gemma, toy_agents

from chorus.ensemble.generate import generate
from chorus.model.agents import Agents, Mode

NEVER = 4  # as an end token: none of these texts holds it
MEMBERS = (None, 0, 1, 2)
ONE = torch.ones(1)


@pytest.fixture(scope="module", params=["sequential", "parallel"])
def agents(request: pytest.FixtureRequest) -> Agents:
    mode: Mode = request.param
    agents = toy_agents(mode).eval()
    make_lively(agents.frozen_tensors())
    return agents


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of many lengths; the sliding window is 6, so that most prompts and all answers leave it."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 1, 23, 6, 7, 14)]


def make_lively(base: Mapping[str, Tensor]) -> None:
    """Let the layers outweigh the embedding: with a random tied head a text would be one token over and over."""
    for name, tensor in base.items():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            tensor.fill_(4.0)


def stock_model(agents: Agents, member: int | None, dtype: torch.dtype = torch.float32) -> Any:
    """The base, or stock PEFT over it with one agent's weights copied in: no layer, cache or loop of Chorus."""
    base = tiny_gemma(dtype=dtype).eval()
    make_lively(dict(base.named_parameters()))
    if member is None:
        return base
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    parameters = dict(model.named_parameters())
    for identity, tensor in agents.adapter_tensors().items():
        if identity.agent == member:
            parameters[f"{identity.path}.lora_{identity.matrix}.default.weight"].data.copy_(tensor)
    return model.to(dtype).eval()


def stock_greedy(model: Any, prompt: list[int], max_new_tokens: int, eos_id: int) -> list[int]:
    """transformers' own greedy search, one unpadded row, without the end token."""
    ids_BT = torch.tensor([prompt])
    written = model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return written[: written.index(eos_id)] if eos_id in written else written


@torch.no_grad()
def naive_mixture(models: list[Any], weight_K: Tensor, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The whole text anew for every token, and the mean of plain probabilities in float64."""
    written: list[int] = []
    for _ in range(max_new_tokens):
        logits_KV = torch.stack([model(input_ids=torch.tensor([prompt + written])).logits[0, -1] for model in models])
        assert logits_KV.dtype == torch.float64
        written.append(int((weight_K.double()[:, None] * logits_KV.softmax(-1)).sum(0).argmax()))
    assert NEVER not in written
    return written


@pytest.mark.parametrize("member", MEMBERS)
def test_greedy_text_is_that_of_transformers_on_stock_peft(
    agents: Agents, prompts: list[list[int]], member: int | None
):
    model = stock_model(agents, member)
    expected = [stock_greedy(model, prompt, 14, NEVER) for prompt in prompts]
    assert generate(agents, [member], ONE, prompts, 14, NEVER) == expected
    assert len({tuple(text) for text in expected}) > 1, "one text for all prompts would prove little"


def test_the_members_write_different_texts(agents: Agents, prompts: list[list[int]]):
    """Otherwise the test above could not tell one from another."""
    texts = [str(generate(agents, [member], ONE, prompts, 8, NEVER)) for member in MEMBERS]
    assert len(set(texts)) == len(MEMBERS)


@pytest.mark.parametrize("members", [[0], [0, 1, 2], [None, 2]])
def test_rows_of_different_lengths_in_one_batch_give_what_each_gives_alone(
    agents: Agents, prompts: list[list[int]], members: list[int | None]
):
    weight_K = torch.full((len(members),), 1 / len(members))
    together = generate(agents, members, weight_K, prompts, 12, NEVER)
    assert together == [generate(agents, members, weight_K, [prompt], 12, NEVER)[0] for prompt in prompts]


@pytest.mark.parametrize("weights", [[1 / 3, 1 / 3, 1 / 3], [0.6, 0.1, 0.3], [0.0, 1.0, 0.0]])
def test_the_mixture_takes_the_most_probable_token_of_the_mean_of_probabilities(
    agents: Agents, prompts: list[list[int]], weights: list[float]
):
    weight_K = torch.tensor(weights)
    models = [stock_model(agents, member, torch.float64) for member in (0, 1, 2)]
    expected = [naive_mixture(models, weight_K, prompt, 10) for prompt in prompts]
    assert generate(agents, [0, 1, 2], weight_K, prompts, 10, NEVER) == expected


def test_a_row_ends_before_its_end_token_and_the_others_go_on(agents: Agents, prompts: list[list[int]]):
    free = generate(agents, [0], ONE, prompts, 15, NEVER)
    eos_id = free[2][4]
    expected = [row[: row.index(eos_id)] if eos_id in row else row for row in free]
    assert len({len(row) for row in expected}) > 1, "rows must end at different places"
    assert generate(agents, [0], ONE, prompts, 15, eos_id) == expected
    model = stock_model(agents, 0)
    assert [stock_greedy(model, prompt, 15, eos_id) for prompt in prompts] == expected


def test_an_end_token_in_a_prompt_is_a_token_like_others(agents: Agents):
    prompt = [1, 9, 1, 17, 33, 8, 9, 1]
    expected = stock_greedy(stock_model(agents, 1), prompt, 10, 1)
    assert expected
    assert generate(agents, [1], ONE, [prompt, [5] * 12], 10, 1)[0] == expected


def test_nothing_is_computed_after_the_last_row_has_ended(agents: Agents, prompts: list[list[int]]):
    free = generate(agents, [2], ONE, prompts, 15, NEVER)
    ends = (
        (token, one, other)
        for (one, row), (other, row_too) in combinations(enumerate(free), 2)
        for token in row
        if token in row_too and row.index(token) != row_too.index(token)
    )
    eos_id, *pair = next(ends)  # two rows that end of the same token at different places
    calls = []
    counter = agents.head().linear.register_forward_hook(lambda *_: calls.append(1))
    rows = generate(agents, [2], ONE, [prompts[number] for number in pair], 100, eos_id)
    counter.remove()
    assert rows == [free[number][: free[number].index(eos_id)] for number in pair]
    assert len(calls) == max(map(len, rows)) + 1


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_a_text_has_at_most_the_tokens_it_may_have(agents: Agents, prompts: list[list[int]], limit: int):
    longer = generate(agents, [0, 1], torch.tensor([0.5, 0.5]), prompts, 9, NEVER)
    short = generate(agents, [0, 1], torch.tensor([0.5, 0.5]), prompts, limit, NEVER)
    assert short == [row[:limit] for row in longer]


def test_no_gradient_flag_turn_or_global_random_state_is_left_behind(agents: Agents, prompts: list[list[int]]):
    flags = [parameter.requires_grad for parameter in agents.parameters()]
    state, turn = torch.random.get_rng_state(), agents.router.turn
    generate(agents, [None, 0, 1], torch.tensor([0.2, 0.3, 0.5]), prompts, 3, NEVER)
    assert flags == [parameter.requires_grad for parameter in agents.parameters()]
    assert torch.equal(state, torch.random.get_rng_state())
    assert turn == agents.router.turn
    assert torch.is_grad_enabled()
