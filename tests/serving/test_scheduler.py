import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing

import pytest
from stock import make_lively
from toy import toy_agents

from chorus.ensemble import decoding_batch, live_batch
from chorus.ensemble.decode import generate
from chorus.ensemble.live_batch import LiveBatch
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.texts import Ending, Text
from chorus.model.agents import Agents
from chorus.serving import scheduler as scheduling
from chorus.serving.scheduler import Busy, Closing, Job, Scheduler

MIXTURE = Answerer("mixture", (0, 1, 2), (0.6, 0.1, 0.3))
AGENT = Answerer("agent_1", (1,))


class Watch:
    """A job of one text, and what is heard of it."""

    def __init__(self, max_new_tokens: int, prompt: tuple[int, ...] = (5, 6, 7), answerer: int = 0) -> None:
        self.text = Text(answerer, prompt, Ending(max_new_tokens, frozenset()))
        self.lengths: list[int] = []
        self.done = threading.Event()
        self.first = threading.Event()
        self.job = Job([self.text], [], self._hear)

    def _hear(self) -> None:
        self.lengths.append(len(self.text.answer.token_ids))
        self.first.set()
        if self.job.is_done:
            self.done.set()


@pytest.fixture(scope="module")
def agents() -> Agents:
    agents = toy_agents("fused").eval()
    make_lively(agents.frozen_tensors())
    return agents


@pytest.fixture
def scheduler(agents: Agents) -> Iterator[Scheduler]:
    scheduler = Scheduler(agents, [MIXTURE], length=400, max_texts=1, max_waiting=1)
    yield scheduler
    scheduler.close()


def test_a_cancelled_text_is_not_written_on_and_its_seat_goes_to_the_next(scheduler: Scheduler):
    long, short = Watch(390), Watch(4)
    scheduler.submit(long.job)
    long.first.wait(60)
    scheduler.submit(short.job)
    scheduler.cancel(long.job)
    assert short.done.wait(60)
    assert len(short.text.answer.token_ids) == 4
    assert not long.job.is_done
    assert len(long.text.answer.token_ids) < 390
    assert scheduler.counts() == {"running": 0, "waiting": 0}


def test_a_queue_that_is_full_refuses_and_a_closed_one_too_but_finishes_what_it_took(scheduler: Scheduler):
    under_way, waits, refused = Watch(60), Watch(3), Watch(3)
    scheduler.submit(under_way.job)
    under_way.first.wait(60)
    scheduler.submit(waits.job)
    with pytest.raises(Busy):
        scheduler.submit(refused.job)
    scheduler.close()
    assert len(under_way.text.answer.token_ids) == 60
    assert len(waits.text.answer.token_ids) == 3
    with pytest.raises(Closing):
        scheduler.submit(refused.job)


def test_a_client_hears_of_each_token_in_turn(scheduler: Scheduler):
    watch = Watch(5)
    scheduler.submit(watch.job)
    assert watch.done.wait(60)
    assert watch.lengths == [1, 2, 3, 4, 5]


def test_a_step_that_fails_ends_its_jobs_with_an_error_and_the_next_are_answered(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
):
    def fail(batch: LiveBatch, steps: int) -> None:
        monkeypatch.undo()
        raise RuntimeError("CUDA error: out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LiveBatch, "advance", fail)
    failing, fine = Watch(5), Watch(5)
    scheduler.submit(failing.job)
    assert failing.done.wait(60)
    assert failing.job.error == "out of memory: 2.00 GiB asked for"
    scheduler.submit(fine.job)
    assert fine.done.wait(60)
    assert fine.job.error is None
    assert len(fine.text.answer.token_ids) == 5


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """Of each pass over prompts, every text's answerer and how many tokens the longest answer has by then."""
    # All come together, however slow the machine: the wait ends once all seats are asked for.
    monkeypatch.setattr(scheduling, "QUIET_S", 60.0)
    monkeypatch.setattr(scheduling, "GATHERING_S", 60.0)
    found: list[list[tuple[int, int]]] = []
    join = LiveBatch.join

    def noted(batch: LiveBatch, texts: Iterable[Text]) -> None:
        under_way = [len(text.answer.token_ids) for text in batch.texts.values()]
        texts = list(texts)
        found.append([(text.answerer, max(under_way, default=0)) for text in texts])
        join(batch, texts)

    monkeypatch.setattr(LiveBatch, "join", noted)
    return found


def joins_of(agents: Agents, joins: list, watches: list[Watch]) -> list:
    """What joined when all came together. Each answer is compared with the one that it gets alone."""
    with closing(Scheduler(agents, [MIXTURE, AGENT], 60, max_texts=len(watches), max_waiting=99)) as asked:
        for watch in watches:
            asked.submit(watch.job)
            time.sleep(0.02)  # without the wait for others the first one would be read by now
        for watch in watches:
            assert watch.done.wait(60)
    found = list(joins)
    for text in (watch.text for watch in watches):
        how = {"max_new_tokens": text.ending.max_new_tokens, "end_ids": ()}
        [[alone]] = generate(agents, [[MIXTURE, AGENT][text.answerer]], [text.prompt], **how)
        assert text.answer.token_ids == alone.token_ids
        assert text.answer.log_probs == pytest.approx(alone.log_probs, abs=1e-4)
    return found


def test_prompts_that_come_together_are_read_in_one_pass_for_each_model(agents: Agents, joins: list):
    prompts = [tuple(range(3, 4 + 3 * n)) for n in range(1, 9)]
    watches = [Watch(3 + n, prompt, n % 2) for n, prompt in enumerate(prompts)]
    assert joins_of(agents, joins, watches) == [[(0, 0)] * 4, [(1, 1)] * 4]


def test_many_prompt_tokens_are_read_in_parts_between_which_the_others_go_on(
    agents: Agents, joins: list, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scheduling, "READING_TOKENS", 60)  # two prompts of 10 tokens by three members
    longer = Watch(20, tuple(range(3, 33)))  # than may be read at a time
    others = [Watch(20, tuple(range(3 + n, 13 + n))) for n in range(5)]
    expected = [[(0, 0)] * 2, [(0, 2)] * 2, [(0, 3)], [(0, 4)]]
    assert joins_of(agents, joins, [*others, longer]) == expected


def test_the_steps_between_two_looks_double_once_nobody_comes(
    agents: Agents, joins: list, monkeypatch: pytest.MonkeyPatch
):
    for module in (decoding_batch, live_batch):
        monkeypatch.setattr(module, "steps_at_a_time", lambda device: 16)  # as on a GPU
    watch = Watch(40)
    joins_of(agents, joins, [watch, Watch(3)])
    assert watch.lengths == [1, 2, 4, 8, 16, 32, 40]
