"""Names for the parts of a training step, said where the part is: `with span("task_loss"):`.

A span costs an eighth of a microsecond while nobody listens. The code that names its parts knows nothing of who does:
a `Stopwatch` (profiler.py), or PyTorch's profiler (trace.py). No span lies inside of a compiled layer or of a recorded
pass, where there would be no moment to time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

Listener = Callable[[str], AbstractContextManager[Any]]

# A plain variable, and no ContextVar: backward on a GPU has a thread of its own, in which that would be unset.
_listener: Listener | None = None
_SILENT = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """The context of a named part of the step. A dot makes it a detail of the part before: `forward_pass.agent_0`."""
    return _SILENT if _listener is None else _listener(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `listener(name)` be the context of every span."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@dataclass
class Span:
    """What was timed: marks of the clock (seconds, or events on a GPU), and the spans inside."""

    name: str
    begin: Any
    end: Any = None
    inner: list["Span"] = field(default_factory=list)

    def seconds(self) -> float:
        """From begin to end. On a GPU the end must have been reached."""
        if isinstance(self.begin, float):
            return self.end - self.begin
        return self.begin.elapsed_time(self.end) / 1000

    def own_seconds(self) -> float:
        """Without the parts inside: those of a step add up to it. Details stay in."""
        return self.seconds() - _parts_inside(self)

    def everything_inside(self) -> Iterator["Span"]:
        """Parts and details, each behind the one that holds it."""
        for inner in self.inner:
            yield inner
            yield from inner.everything_inside()


def _parts_inside(span: Span) -> float:
    return sum(_parts_inside(inner) if "." in inner.name else inner.seconds() for inner in span.inner)


class Stopwatch:
    """Times spans on the host's clock, or as a GPU passes them: then nothing waits, and it is read in the end."""

    def __init__(self, device: torch.device):
        self._mark = _event if device.type == "cuda" else perf_counter
        self._open: list[Span] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[Span]:
        if self._open and self._open[-1].name == "backward_pass":
            yield self._open[-1]  # passes that are made again in backward are its own time
            return
        timed = Span(name, self._mark())
        if self._open:
            self._open[-1].inner.append(timed)
        self._open.append(timed)
        try:
            yield timed
        finally:
            self._open.pop()
            timed.end = self._mark()


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
