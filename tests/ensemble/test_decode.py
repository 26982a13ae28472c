from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES, agents_of, of_family
from stock import entropy, make_lively, next_log_probs, stock_greedy, stock_model, word_tokenizer
from torch import Tensor
from toy import toy_agents

from chorus.ensemble import decoding_batch, live_batch
from chorus.ensemble.decode import Answer, generate
from chorus.ensemble.live_batch import LiveBatch
from chorus.ensemble.next_token import Answerer, Draws, draw
from chorus.ensemble.seating import seat
from chorus.ensemble.texts import Ending, Text
from chorus.errors import InputError
from chorus.model.agents import Agents, Mode
from chorus.model.kernels import decode_graphs

NEVER = 4  # as an end token: none of these texts holds it
MEMBERS = [Answerer("base", (None,)), *(Answerer(f"agent {k}", (k,)) for k in range(3))]
MIXTURES = [
    Answerer("mixture", (0, 1, 2), (0.6, 0.1, 0.3)),
    Answerer("tempered", (0, 1, 2), (0.0, 0.5, 0.5), 1.7),
]
EVERYBODY = [*MEMBERS, *MIXTURES]


@pytest.fixture(scope="module", params=["fused", "parallel"])
def agents(request: pytest.FixtureRequest) -> Agents:
    mode: Mode = request.param
    agents = toy_agents(mode).eval()
    make_lively(agents.frozen_tensors())
    return agents


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of many lengths; the sliding window is 6, so that most prompts and all answers leave it."""
    return random_prompts(5, 1, 23, 6, 7, 14)


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 56, (n,), generator=generator).tolist() for n in lengths]


def tokens(answers: list[list[Answer]]) -> list[list[list[int]]]:
    return [[answer.token_ids for answer in row] for row in answers]


def test_every_answer_of_one_pass_is_that_of_transformers_on_stock_peft(
    agents: Agents, prompts: list[list[int]]
):
    answers = tokens(generate(agents, EVERYBODY, prompts, max_new_tokens=14, end_ids=[NEVER]))
    for row, answerer in zip(answers, MEMBERS, strict=False):
        model = stock_model(agents, answerer.members[0])
        assert row == [stock_greedy(model, prompt, 14, NEVER) for prompt in prompts], answerer.name
    assert len({str(row) for row in answers}) == len(EVERYBODY), (
        "answerers that agree could not be told apart"
    )


def test_the_mixture_and_its_figures_are_those_of_plain_probabilities_in_float64(
    agents: Agents, prompts: list[list[int]]
):
    models = [stock_model(agents, member, torch.float64) for member in (0, 1, 2)]
    answers = generate(agents, MIXTURES, prompts[:3], max_new_tokens=8, end_ids=[NEVER])
    for answerer, row in zip(MIXTURES, answers, strict=True):
        for prompt, answer in zip(prompts[:3], row, strict=True):
            for n, token in enumerate(answer.token_ids):
                text = prompt + answer.token_ids[:n]
                log_prob_V = next_log_probs(models, answerer.weights, text, answerer.temperature)
                own = [next_log_probs([model], [1.0], text, 1.0) for model in models]
                pooled_V = next_log_probs(models, answerer.weights, text, 1.0)
                mutual = entropy(pooled_V) - sum(
                    w * entropy(p) for w, p in zip(answerer.weights, own, strict=True)
                )
                assert token == int(log_prob_V.argmax())
                assert answer.log_probs[n] == pytest.approx(float(log_prob_V[token]), abs=1e-4)
                assert answer.entropies[n] == pytest.approx(entropy(log_prob_V), abs=1e-4)
                assert answer.mutual_informations[n] == pytest.approx(mutual, abs=1e-4)
                assert answer.member_log_probs[n] == pytest.approx([float(p[token]) for p in own], abs=1e-4)


def test_an_answer_does_not_depend_on_what_is_answered_beside_it(agents: Agents, prompts: list[list[int]]):
    how: dict[str, Any] = {
        "max_new_tokens": 9,
        "end_ids": [33, 8],
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 5,
    }
    together = tokens(generate(agents, EVERYBODY, prompts, **how))
    assert tokens(generate(agents, EVERYBODY, prompts, **how, prompts_per_wave=2)) == together
    for index, answerer in enumerate(EVERYBODY):
        assert tokens(generate(agents, [answerer], prompts, **how)) == [together[index]]
    assert tokens(generate(agents, EVERYBODY, prompts, **{**how, "seed": 6})) != together


def test_texts_that_end_leave_the_batch_and_the_others_go_on(
    agents: Agents, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """Each answerer's texts end at other places, so that members come to have different numbers of rows."""
    free = tokens(generate(agents, EVERYBODY, prompts, max_new_tokens=15, end_ids=[NEVER]))
    ends = {free[2][2][4], free[4][0][2], free[1][3][1]}
    sizes: list[int] = []
    step = decoding_batch.DecodingBatch._step
    monkeypatch.setattr(
        decoding_batch.DecodingBatch, "_step", lambda batch: (sizes.append(len(batch.text_R)), step(batch))
    )
    answers = generate(agents, EVERYBODY, prompts, max_new_tokens=15, end_ids=ends)
    for row, whole in zip(answers, free, strict=True):
        for answer, text in zip(row, whole, strict=True):
            end = next((n for n, token in enumerate(text) if token in ends), None)
            assert answer.token_ids == text[:end]
            assert answer.ended == ("length" if end is None else "end")
            assert len(answer.log_probs) == len(answer.token_ids) + (answer.ended == "end")
            assert len(answer.log_probs) == len(answer.entropies) == len(answer.member_log_probs)
    assert sizes[-1] < sizes[0], "rows must have left"


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_a_text_has_at_most_the_tokens_it_may_have(agents: Agents, prompts: list[list[int]], limit: int):
    longer = tokens(generate(agents, MIXTURES, prompts, max_new_tokens=6, end_ids=[NEVER]))
    short = tokens(generate(agents, MIXTURES, prompts, max_new_tokens=limit, end_ids=[NEVER]))
    assert short == [[text[:limit] for text in row] for row in longer]


@pytest.mark.parametrize("limit", [9, 12])
def test_steps_between_two_looks_add_nothing_to_an_answer(
    agents: Agents, prompts: list[list[int]], limit: int, monkeypatch: pytest.MonkeyPatch
):
    """A GPU looks every 16 steps at what has ended; four on a CPU reach beyond the limit in the same way."""
    how: dict[str, Any] = {"max_new_tokens": limit, "end_ids": [NEVER], "tokenizer": word_tokenizer()}
    one_by_one = generate(agents, EVERYBODY, prompts, **how)
    late = one_by_one[0][0].text.split()[-1]  # a stop string that must end nothing beyond the limit
    monkeypatch.setattr(decoding_batch, "steps_at_a_time", lambda device: 4)
    several = generate(agents, EVERYBODY, prompts, **how)
    assert tokens(several) == tokens(one_by_one)
    for row, expected in zip(several, one_by_one, strict=True):
        for answer, same in zip(row, expected, strict=True):
            assert answer.ended == same.ended
            assert len(answer.log_probs) == len(answer.entropies) == len(answer.token_ids)
            assert answer.log_probs == pytest.approx(same.log_probs, abs=1e-5)
    stopping = generate(agents, MEMBERS, prompts, **{**how, "stop": [late]})
    monkeypatch.setattr(decoding_batch, "steps_at_a_time", lambda device: 1)
    expected = generate(agents, MEMBERS, prompts, **{**how, "stop": [late]})
    assert [[a.ended for a in row] for row in stopping] == [[a.ended for a in row] for row in expected]


def test_a_stop_string_ends_an_answer_before_it(agents: Agents, prompts: list[list[int]]):
    how: dict[str, Any] = {"max_new_tokens": 8, "end_ids": [NEVER], "tokenizer": word_tokenizer()}
    free = generate(agents, MEMBERS, prompts, **how)
    stop = f"w{free[1][0].token_ids[3]}"
    stopped = generate(agents, MEMBERS, prompts, **how, stop=[stop])
    for row, whole in zip(stopped, free, strict=True):
        for answer, text in zip(row, whole, strict=True):
            assert answer.text == text.text.split(stop)[0]
            assert (answer.ended == "stop") == (stop in text.text)
            assert answer.token_ids == text.token_ids[: len(answer.token_ids)]
            assert len(answer.log_probs) == len(answer.token_ids)
    assert stopped[1][0].ended == "stop"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_bases_writes_with_caches_what_it_writes_without(family: str):
    agents = agents_of(family).eval()
    prompts = random_prompts(5, 9, 2)
    everybody = [Answerer("base", (None,)), Answerer("0", (0,)), Answerer("1", (1,))]
    answers = tokens(generate(agents, everybody, prompts, max_new_tokens=9, end_ids=[]))
    for answerer, row in zip(everybody, answers, strict=True):
        assert row == [uncached(agents, answerer.members[0], prompt, 9) for prompt in prompts]


@torch.no_grad()
def uncached(agents: Agents, member: int | None, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with agents.trunk(member) as trunk:
            hidden_1TD = trunk(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        ids.append(int(agents.head().logits(hidden_1TD[:, -1]).argmax()))
    return ids[len(prompt) :]


def test_in_bf16_log_probabilities_are_within_a_tolerance_of_stock_peft(prompts: list[list[int]]):
    """Both round differently, by steps of 1/64 in logits of 3: 0.05 nats in the mean and 0.25 at most after
    two layers of large random weights."""
    differences: list[float] = []
    agents = toy_agents("fused", dtype=torch.bfloat16).eval()
    make_lively(agents.frozen_tensors())
    answers = generate(agents, MEMBERS, prompts, max_new_tokens=6, end_ids=[NEVER])
    for answerer, row in zip(MEMBERS, answers, strict=True):
        model = stock_model(agents, answerer.members[0], torch.bfloat16)
        for prompt, answer in zip(prompts, row, strict=True):
            ids = torch.tensor([prompt + answer.token_ids])
            with torch.no_grad():
                log_prob_TV = model(input_ids=ids).logits[0].float().log_softmax(-1)
            expected = [float(log_prob_TV[len(prompt) + n - 1, t]) for n, t in enumerate(answer.token_ids)]
            differences += [abs(own - other) for own, other in zip(answer.log_probs, expected, strict=True)]
    assert sum(differences) / len(differences) < 0.05
    assert max(differences) < 0.25


def test_no_flag_adapter_attention_or_global_random_state_is_left_behind(
    agents: Agents, prompts: list[list[int]]
):
    def state() -> list[Any]:
        flags = [parameter.requires_grad for parameter in agents.parameters()]
        return [flags, agents.router.context, agents.config._attn_implementation, torch.is_grad_enabled()]

    before, random_state = state(), torch.random.get_rng_state()
    generate(agents, EVERYBODY, prompts, max_new_tokens=3, end_ids=[NEVER], temperature=1.0)
    assert state() == before
    assert torch.equal(random_state, torch.random.get_rng_state())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.7), (1.0, 0.01)])
def test_draws_have_the_frequencies_of_the_distribution_they_are_from(temperature: float, top_p: float):
    probability_V = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    uniform_N = torch.arange(20_000, dtype=torch.float64) / 20_000
    draws = Draws(uniform_N, torch.full((20_000,), temperature), torch.full((20_000,), top_p))
    drawn_N = draw(probability_V.log().expand(20_000, 5), draws)
    assert torch.allclose(
        drawn_N.bincount(minlength=5) / 20_000, expected(probability_V, temperature, top_p), atol=1e-4
    )


def expected(probability_V: Tensor, temperature: float, top_p: float) -> Tensor:
    sharpened = probability_V ** (1 / temperature)
    sharpened /= sharpened.sum()
    kept, total = torch.zeros(5), 0.0
    for token in sharpened.argsort(descending=True).tolist():
        if total < top_p:
            kept[token] = sharpened[token]
        total += float(sharpened[token])
    return kept / kept.sum()


def test_a_batch_has_few_empty_rows_however_unevenly_answers_end():
    seating = seat(EVERYBODY, [range(40), range(40, 43), range(50, 51), [], range(60, 65), [72]])
    rows = len(seating.slot_of_row())
    assert rows == len(seating.members_G) * seating.block
    assert rows <= 1.2 * (40 + 3 + 1 + 3 * 5 + 3 * 1)
    assert [prompt for prompt in seating.texts_A[0] if prompt is not None] == list(range(40))


@pytest.mark.parametrize(
    ("answerer", "how"),
    [
        (Answerer("x", (0, 1), (0.7, 0.7)), {}),
        (Answerer("x", (0, 1)), {}),
        (Answerer("x", (0,), temperature=0.0), {}),
        (MEMBERS[0], {"top_p": 0.0}),
        (MEMBERS[0], {"temperature": -1.0}),
    ],
)
def test_weights_and_temperatures_out_of_range_are_refused(
    agents: Agents, answerer: Answerer, how: dict[str, float]
):
    with pytest.raises(ValueError, match=r"weights|temperature"):
        generate(agents, [answerer], [[5]], max_new_tokens=1, end_ids=[], **how)  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_captured_step_writes_what_transformers_and_the_same_step_uncaptured_write(
    prompts: list[list[int]], temperature: float
):
    agents = toy_agents("fused", device="cuda").eval()
    make_lively(agents.frozen_tensors())
    how: dict[str, Any] = {"max_new_tokens": 40, "end_ids": [33], "temperature": temperature}
    eager = tokens(generate(agents, EVERYBODY, prompts, **how, captured=False))
    captured = generate(agents, EVERYBODY, prompts, **how, captured=True)
    assert tokens(captured) == eager
    if temperature == 0:
        for row, answerer in zip(eager, MEMBERS, strict=False):
            model = stock_model(agents, answerer.members[0], device="cuda")
            assert row == [stock_greedy(model, prompt, 40, 33) for prompt in prompts]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss", "gemma-4 experts", "deepseek-v3"])
def test_a_base_with_experts_writes_the_same_on_a_gpu_whether_its_step_can_be_captured_or_not(family: str):
    agents, asked = agents_of(family, device="cuda").eval(), random_prompts(9, 4)
    how: dict[str, Any] = {"max_new_tokens": 20, "end_ids": [NEVER]}
    eager = tokens(generate(agents, MEMBERS, asked, **how, captured=False))
    assert tokens(generate(agents, MEMBERS, asked, **how)) == eager


def test_a_step_that_cannot_be_captured_is_taken_without_a_graph_and_said_once(
    agents: Agents,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    tried = []

    def refused(step: Callable[[], None], counters: Sequence[Tensor]) -> decode_graphs.CapturedStep:
        tried.append(step)
        step()  # the first warm-up, which counts on
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with")

    monkeypatch.setattr(decode_graphs, "CapturedStep", refused)
    how: dict[str, Any] = {"max_new_tokens": 14, "end_ids": [NEVER]}
    eager = tokens(generate(agents, EVERYBODY, prompts, **how, captured=False))
    decode_graphs._tell.cache_clear()
    assert tokens(generate(agents, EVERYBODY, prompts, **how, captured=True)) == eager
    assert tokens(generate(agents, EVERYBODY, prompts, **how, captured=True)) == eager
    assert len(tried) == 2
    said = [line for line in caplog.messages if "cannot be captured" in line]
    assert said == [
        "a decoding step cannot be captured, so texts are written without CUDA graphs: CUDA error: operation "
        "not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("steps", [1, 16])  # at a time: of a CPU and of a GPU
def test_texts_reach_the_last_learned_position_and_no_step_reads_beyond_it(
    steps: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """transformers reads 64 tokens and writes a 65th; with one more it ends with an IndexError."""
    for module in (decoding_batch, live_batch):
        monkeypatch.setattr(module, "steps_at_a_time", lambda device: steps)
    agents, positions, count = agents_of("gpt2").eval(), 64, 14
    asked = random_prompts(49, 3, 50, 51, 52, 63, 64)
    everybody = [Answerer("base", (None,)), Answerer("mixture", (0, 1), (0.5, 0.5))]
    found, _ = tokens(generate(agents, everybody, asked, max_new_tokens=count, end_ids=[NEVER]))
    model = of_family("gpt2")
    expected = [
        stock_greedy(model, prompt, min(count, positions + 1 - len(prompt)), NEVER) for prompt in asked
    ]
    assert found == expected
    assert "3 of 7 answers end before 14 tokens" in caplog.text
    batch = LiveBatch(agents, everybody, positions)  # as a server's
    room = batch.most_tokens - count
    texts = [Text(0, tuple(prompt[:room]), Ending(count, frozenset([NEVER]))) for prompt in asked]
    batch.join(texts)
    while batch.texts:
        batch.advance()
    for text in texts:
        assert text.answer.token_ids == stock_greedy(model, text.prompt, count, NEVER)
    with pytest.raises(InputError, match="a prompt has 65 tokens, and the base has 64 positions"):
        generate(agents, everybody, random_prompts(65), max_new_tokens=1, end_ids=[NEVER])
