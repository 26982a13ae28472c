from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from families import agents_of
from stock import make_lively, stock_greedy, stock_model, word_tokenizer
from toy import toy_agents

from chorus.ensemble import decoding_batch, live_batch
from chorus.ensemble.cached_lanes import CachedLanes
from chorus.ensemble.decode import generate
from chorus.ensemble.live_batch import LiveBatch
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.texts import Answer, Ending, Sampling, Text
from chorus.model.agents import Agents, Mode

NEVER = 4  # as an end token: none of these texts holds it
MEMBERS = [Answerer("base", (None,)), *(Answerer(f"agent_{k}", (k,)) for k in range(3))]
EVERYBODY = [*MEMBERS, Answerer("mixture", (0, 1, 2), (0.6, 0.1, 0.3), 1.2)]
MIXTURE = 4
LENGTH = 40


@pytest.fixture(scope="module", params=["fused", "parallel"])
def agents(request: pytest.FixtureRequest) -> Agents:
    mode: Mode = request.param
    agents = toy_agents(mode).eval()
    make_lively(agents.frozen_tensors())
    return agents


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    """The sliding window is 6."""
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(3, 56, (n,), generator=generator).tolist()) for n in lengths]


def write(batch: LiveBatch, texts: list[Text], joins: Mapping[int, int]) -> None:
    """Write all texts; after so many steps so many of them join."""
    step, coming = 0, list(texts)
    while batch.texts or coming:
        count = joins.get(step, 0)
        if count:
            batch.join(coming[:count])
            del coming[:count]
        batch.advance()
        step += 1
        assert step < 200


@pytest.mark.parametrize("steps", [1, 4])  # between two looks at what has ended; a GPU takes 16
def test_texts_that_join_later_are_written_as_transformers_writes_them_alone(
    agents: Agents, steps: int, monkeypatch: pytest.MonkeyPatch
):
    for module in (decoding_batch, live_batch):
        monkeypatch.setattr(module, "steps_at_a_time", lambda device: steps)
    moves: list[int] = []
    move = CachedLanes.move_to

    def noted(lanes: CachedLanes, column: int) -> None:
        moves.append(column - lanes.column)
        move(lanes, column)

    monkeypatch.setattr(CachedLanes, "move_to", noted)
    asked = prompts(5, 1, 23, 6, 7, 14, 2, 3, 9, 4)
    limits = [14, 30, 12, 9, 14, 20, 30, 3, 1, 30]
    who = [4, 1, 4, 2, 0, 4, 3, 4, 4, 1]
    texts = [
        Text(index, prompt, Ending(limit, frozenset([NEVER])))
        for index, prompt, limit in zip(who, asked, limits, strict=True)
    ]
    joins = Counter[int]()
    for step, count in {0: 1, 3: 2, 4: 1, 9: 3, 20: 2, 34: 1}.items():
        joins[step // steps] += count
    write(LiveBatch(agents, EVERYBODY, LENGTH), texts, joins)
    assert min(moves) < 0 < max(moves), "texts must have moved both ways"
    models: dict[int, Any] = {}
    for text in texts:
        limit = text.ending.max_new_tokens
        if text.answerer == MIXTURE:
            [[alone]] = generate(
                agents, [EVERYBODY[MIXTURE]], [text.prompt], max_new_tokens=limit, end_ids=[NEVER]
            )
            assert text.answer.token_ids == alone.token_ids
            assert text.answer.log_probs == pytest.approx(alone.log_probs, abs=1e-4)
            assert text.answer.mutual_informations == pytest.approx(alone.mutual_informations, abs=1e-4)
        else:
            if text.answerer not in models:
                models[text.answerer] = stock_model(agents, EVERYBODY[text.answerer].members[0])
            expected = stock_greedy(models[text.answerer], list(text.prompt), limit, NEVER)
            assert text.answer.token_ids == expected


def test_each_text_is_drawn_as_alone_beside_others_with_other_temperatures(agents: Agents):
    asked = prompts(5, 8, 3, 12)
    samplings = [Sampling(0.9, 1.0, 1, 0), Sampling(), Sampling(1.3, 0.8, 2, 1), Sampling(0.7, 0.5, 3, 0)]
    ending = Ending(9, frozenset([NEVER]))

    def texts() -> list[Text]:
        return [Text(MIXTURE, prompt, ending, one) for prompt, one in zip(asked, samplings, strict=True)]

    together, alone = texts(), texts()
    write(LiveBatch(agents, EVERYBODY, LENGTH), together, {0: 2, 3: 1, 5: 1})
    for text in alone:
        write(LiveBatch(agents, EVERYBODY, LENGTH), [text], {0: 1})
    assert [one.answer.token_ids for one in together] == [one.answer.token_ids for one in alone]


def test_the_most_probable_tokens_are_those_of_the_pooled_distribution():
    agents = toy_agents("fused").eval()
    make_lively(agents.frozen_tensors())
    [plain, prompt] = prompts(4, 7)
    ending = Ending(5, frozenset([NEVER]))
    texts = [Text(MIXTURE, plain, ending), Text(MIXTURE, prompt, ending, num_tops=3)]
    write(LiveBatch(agents, EVERYBODY, LENGTH), texts, {0: 1, 1: 1})
    assert texts[0].answer.tops == []
    answer = texts[1].answer
    for token, log_prob, tops in zip(answer.token_ids, answer.log_probs, answer.tops, strict=True):
        assert tops[0] == (token, pytest.approx(log_prob, abs=1e-5))
        assert [own for _, own in tops] == sorted((own for _, own in tops), reverse=True)
        assert len({number for number, _ in tops}) == 3


def test_a_seat_that_is_dropped_is_used_again_without_a_new_batch():
    agents = toy_agents("fused").eval()
    make_lively(agents.frozen_tensors())
    first, second, third = prompts(5, 6, 7)
    batch = LiveBatch(agents, EVERYBODY, LENGTH)
    ending = Ending(20, frozenset([NEVER]))
    gone, stays, comes = (Text(MIXTURE, prompt, ending) for prompt in (first, second, third))
    batch.join([gone, stays])
    batch.advance()
    batch.drop(gone)
    before = batch._batch
    assert before is not None
    caches = [layer.keys.data_ptr() for state in before.lanes.states for layer in state.cache.layers]  # pyright: ignore
    batch.join([comes])
    while batch.texts:
        batch.advance()
        if not stays.has_ended:
            own = [layer.keys.data_ptr() for state in before.lanes.states for layer in state.cache.layers]  # pyright: ignore
            assert own == caches
    assert len(gone.answer.token_ids) == 2
    for text in (stays, comes):
        [[alone]] = generate(agents, [EVERYBODY[MIXTURE]], [text.prompt], max_new_tokens=20, end_ids=[NEVER])
        assert text.answer.token_ids == alone.token_ids


def test_a_batch_shrinks_only_once_fewer_rows_have_sufficed_for_a_while():
    """Others may come, and each size is captured anew on a GPU."""
    agents = toy_agents("fused").eval()
    batch, ending = LiveBatch(agents, EVERYBODY, LENGTH), Ending(30, frozenset([NEVER]))
    stays, *gone = (Text(MIXTURE, prompt, ending) for prompt in prompts(5, 6, 7, 8))
    batch.join([stays, *gone])
    for text in gone:
        batch.drop(text)
    rows = []
    for _ in range(live_batch.PATIENCE + 2):
        batch.advance()
        assert batch._batch is not None
        rows.append(len(batch._batch.text_R))
    assert rows == [4 * 3] * live_batch.PATIENCE + [3] * 2
    while batch.texts:
        batch.advance()
    [[alone]] = generate(agents, [EVERYBODY[MIXTURE]], [stays.prompt], max_new_tokens=30, end_ids=[NEVER])
    assert stays.answer.token_ids == alone.token_ids


def test_a_base_without_static_caches_takes_texts_in_only_between_batches():
    agents = agents_of("qwen3.5", "fused").eval()
    batch = LiveBatch(agents, MEMBERS[:2], LENGTH)
    first, second = (Text(1, prompt, Ending(4, frozenset())) for prompt in prompts(5, 6))
    assert batch.can_join
    batch.join([first])
    assert not batch.can_join
    while not batch.can_join:
        batch.advance()
    batch.join([second])
    while batch.texts:
        batch.advance()
    for text in (first, second):
        [[alone]] = generate(agents, [MEMBERS[1]], [text.prompt], max_new_tokens=4, end_ids=[])
        assert text.answer.token_ids == alone.token_ids


def test_what_is_settled_of_a_text_stays_however_it_goes_on():
    ending = Ending(9, frozenset(), ("w7 w8",), word_tokenizer())
    answer = Answer(token_ids=[5, 6, 7])
    settled = ending.settled_text_of(answer)
    assert settled == "w5 w6 "
    for more in ([8], [9]):
        whole = Answer(token_ids=[5, 6, 7, *more])
        ending.apply(whole)
        assert ending.text_of(whole).startswith(settled)
        assert "".join(ending.pieces(whole)) == ending.text_of(whole)
