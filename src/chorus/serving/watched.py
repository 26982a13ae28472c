"""The part of a job's texts that is new since the last event."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from chorus.ensemble.texts import Text
from chorus.serving.scheduler import Job, Score


class Delta(NamedTuple):
    """New characters of one text.

    Attributes:
        place: of the text in its job.
        pieces: what each new token adds; empty where nobody asked for tokens.
        first: the first of these tokens.
        offset: characters that came before.
    """

    place: int
    content: str
    pieces: list[str]
    first: int
    offset: int
    is_last: bool


class Watched:
    """A job, and a queue in the client's event loop with the results of its steps.

    Attributes:
        deltas: of a job that is streamed; None is its end.
    """

    def __init__(
        self, texts: Sequence[Text], scores: Sequence[Score], is_streamed: bool, has_tokens: bool
    ) -> None:
        self.job = Job(list(texts), list(scores), self._on_step)
        self.deltas: asyncio.Queue[Delta | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._is_streamed, self._has_tokens = is_streamed, has_tokens
        self._shown = [0] * len(texts)
        self._ends: list[list[int]] = [[] for _ in texts]
        self._told = [0] * len(texts)
        self._is_over = [False] * len(texts)

    def _on_step(self) -> None:
        """Runs in the scheduler's thread, between two steps, so the texts do not change meanwhile."""
        found: list[Delta | None] = []
        if self._is_streamed and self.job.error is None:
            for index, text in enumerate(self.job.texts):
                delta = None if self._is_over[index] else self._delta(index, text)
                if delta is not None:
                    found.append(delta)
        if self.job.is_done:
            found.append(None)
        for one in found:
            self._loop.call_soon_threadsafe(self.deltas.put_nowait, one)

    def _delta(self, index: int, text: Text) -> Delta | None:
        ending, answer = text.ending, text.answer
        is_last = self._is_over[index] = text.has_ended
        settled = ending.text_of(answer) if is_last else ending.settled_text_of(answer)
        start, first = self._shown[index], self._told[index]
        pieces: list[str] = []
        if self._has_tokens:
            pieces = self._new_pieces(index, text, settled, is_last)
            settled = settled if is_last else settled[: start + sum(map(len, pieces))]
        self._shown[index] = len(settled)
        if not (settled[start:] or pieces or is_last):
            return None
        return Delta(index, settled[start:], pieces, first, start, is_last)

    def _new_pieces(self, index: int, text: Text, settled: str, is_last: bool) -> list[str]:
        """The tokens whose characters are all settled."""
        ends = self._ends[index]
        del ends[len(text.answer.token_ids) :]
        ends += text.ending.ends_of_tokens(text.answer, len(ends))
        pieces, place = [], self._shown[index]
        for number in range(self._told[index], len(ends)):
            end = len(settled) if is_last and number + 1 == len(ends) else min(ends[number], len(settled))
            if not is_last and ends[number] > len(settled):
                break
            pieces.append(settled[place : max(place, end)])
            place = max(place, end)
        self._told[index] += len(pieces)
        return pieces
