"""Requests of many clients, answered in one batch by a thread that owns the agents."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chorus.data.samples import Sample
from chorus.ensemble.decoding_batch import STEPS_AT_A_TIME
from chorus.ensemble.distributions import predict, token_states
from chorus.ensemble.live_batch import LiveBatch
from chorus.ensemble.next_token import Answerer
from chorus.ensemble.texts import Text
from chorus.errors import out_of_memory
from chorus.model.agents import Agents

logger = logging.getLogger(__name__)

# A batch that is idle begins once no request has come for so long, so that those that come together are read
# together; after so long in all it begins anyway.
QUIET_S, GATHERING_S = 0.005, 0.05
# Prompt tokens that are read between two steps, padding included, over all members: a tenth of a second for
# gemma-2-2b on an H100, in which no text grows. A prompt that is longer is read alone.
READING_TOKENS = 8192


class Busy(Exception):
    """The queue is full."""


class Closing(Exception):
    """The server is shutting down and accepts no requests."""


@dataclass
class Score:
    """A given text to score.

    Attributes:
        log_probs: of every token but the first, which nothing precedes.
    """

    answerer: int
    ids: tuple[int, ...]
    log_probs: list[float] = field(default_factory=list)


@dataclass
class Job:
    """The work of one request.

    Attributes:
        on_step: called by the scheduler's thread after each step, and at the end. No other thread may read
            the texts before `is_done`.
        is_done: all texts have ended, or an error occurred.
        error: the message for the client; None without an error.
    """

    texts: list[Text]
    scores: list[Score]
    on_step: Callable[[], None]
    is_done: bool = False
    is_cancelled: bool = False
    error: str | None = None


class Scheduler:
    """A thread that answers jobs in order of arrival, as many at a time as there are seats.

    Jobs join the batch between two steps. Prompts that join together are read together. After that the steps
    between two looks at who has come are few, and double from look to look: others may have come meanwhile.
    """

    def __init__(
        self, agents: Agents, answerers: Sequence[Answerer], length: int, max_texts: int, max_waiting: int
    ) -> None:
        """Start the thread.

        Args:
            length: columns of the caches.
            max_texts: at the same time.
            max_waiting: length of the queue.
        """
        self.agents, self.answerers = agents, tuple(answerers)
        self.length, self.max_texts, self.max_waiting = length, max_texts, max_waiting
        self.most_tokens = LiveBatch(agents, answerers, length).most_tokens
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._steps = 1  # before the next look
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="chorus-scheduler", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn.

        Raises:
            Busy: the queue is full.
            Closing: the server is shutting down.
        """
        with self._changed:
            if self._is_closing:
                raise Closing
            if len(self._waiting) >= self.max_waiting:
                raise Busy
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Stop a job whose client has disconnected; its seats are freed before the next step."""
        with self._changed:
            job.is_cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Accept no further job, finish the accepted ones, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def counts(self) -> dict[str, int]:
        """Number of running texts and of waiting jobs."""
        with self._changed:
            running = sum(len(job.texts) for job in self._running)
            return {"running": running, "waiting": len(self._waiting)}

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        batch = LiveBatch(self.agents, self.answerers, self.length)
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._is_closing):
                    self._changed.wait()
                if not (self._waiting or self._running):
                    return
                if not self._running:
                    self._gather()
                coming = self._admitted(batch)
            try:
                self._steps = 1 if coming else min(2 * self._steps, STEPS_AT_A_TIME)
                self._start(batch, coming)
                if coming:
                    self._report(batch)  # for the first tokens, before many further steps
                batch.advance(self._steps)
            except Exception as error:
                lack = out_of_memory(error)
                if lack is None:
                    logger.exception("a step of the batch failed")
                for job in self._running:
                    job.error = f"out of memory: {lack}" if lack else f"{type(error).__name__} in the server"
                batch = LiveBatch(self.agents, self.answerers, self.length)
            self._report(batch)

    def _gather(self) -> None:
        """Wait until no further job comes, for a moment. Waiting frees the lock, so that jobs can come."""
        begin = time.monotonic()
        while not self._is_closing and len(self._waiting) < self.max_waiting:
            has_all_seats_taken = sum(len(job.texts) for job in self._waiting) >= self.max_texts
            is_late = time.monotonic() - begin > GATHERING_S
            if has_all_seats_taken or is_late or not self._changed.wait(QUIET_S):
                break

    def _admitted(self, batch: LiveBatch) -> list[Job]:
        """Drop cancelled jobs, and admit the next ones."""
        for job in [job for job in self._running if job.is_cancelled]:
            for text in job.texts:
                batch.drop(text)
            self._running.remove(job)
        self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
        coming: list[Job] = []
        seated = len(batch.texts)
        while self._waiting and batch.can_join and seated + len(self._waiting[0].texts) <= self.max_texts:
            if coming and self._reading_tokens([*coming, self._waiting[0]]) > READING_TOKENS:
                break
            job = self._waiting.popleft()
            coming.append(job)
            seated += len(job.texts)
        self._running += coming
        return coming

    def _reading_tokens(self, jobs: Sequence[Job]) -> int:
        """Tokens of the passes that read these jobs' prompts and score their texts."""
        tokens = 0
        for index, answerer in enumerate(self.answerers):
            prompts = {text.prompt for job in jobs for text in job.texts if text.answerer == index}
            padded = len(prompts) * max(map(len, prompts), default=0)
            scored = sum(len(one.ids) for job in jobs for one in job.scores if one.answerer == index)
            tokens += len(answerer.members) * (padded + scored)
        return tokens

    def _start(self, batch: LiveBatch, coming: Sequence[Job]) -> None:
        for job in coming:
            for score in job.scores:
                score.log_probs = _log_probs(self.agents, self.answerers[score.answerer], score.ids).tolist()
        texts = [text for job in coming for text in job.texts]
        # A prompt is read by the members of all answerers that join with it.
        asked = sorted({text.answerer for text in texts})
        groups = [[text for text in texts if text.answerer == index] for index in asked]
        for group in groups if batch.is_static else [texts] if texts else []:
            batch.join(group)

    def _report(self, batch: LiveBatch) -> None:
        """Call every job's `on_step`."""
        under_way = {id(text) for text in batch.texts.values()}
        for job in list(self._running):
            job.is_done = job.error is not None or not any(id(text) in under_way for text in job.texts)
            if job.is_done:
                with self._changed:
                    self._running.remove(job)
            job.on_step()


@torch.no_grad()
def _log_probs(agents: Agents, answerer: Answerer, ids: Sequence[int]) -> Tensor:
    """log_prob_N of every token of a text but the first, in a pass of its own."""
    if len(ids) < 2:
        return torch.empty(0)
    sample = Sample(torch.tensor(ids), torch.arange(len(ids)) >= 1)
    head = agents.head()
    chunks = (
        chunk for state in token_states(agents, answerer.members, [sample]) for chunk in state.chunks(head)
    )
    [[[found]]] = predict(chunks, [answerer], answerer.members, [[answerer.temperature]], 1)
    return found.log_prob_N
