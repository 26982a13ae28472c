import threading
from collections.abc import Iterator

import pytest
from stock import make_lively
from toy import toy_agents

from chorus.ensemble.live_batch import LiveBatch
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.texts import Ending, Text
from chorus.serving.scheduler import Busy, Closing, Job, Scheduler

MIXTURE = Answerer("mixture", (0, 1, 2), (0.6, 0.1, 0.3))


class Watch:
    """A job of one text, and what is heard of it."""

    def __init__(self, max_new_tokens: int) -> None:
        self.text = Text(0, (5, 6, 7), Ending(max_new_tokens, frozenset()))
        self.lengths: list[int] = []
        self.done = threading.Event()
        self.first = threading.Event()
        self.job = Job([self.text], [], self._hear)

    def _hear(self) -> None:
        self.lengths.append(len(self.text.answer.token_ids))
        self.first.set()
        if self.job.is_done:
            self.done.set()


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    agents = toy_agents("fused").eval()
    make_lively(agents.frozen_tensors())
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
    def fail(batch: LiveBatch) -> None:
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
