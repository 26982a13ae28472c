"""Named spans of a training step: `with span("task_loss"):`.

A span costs an eighth of a microsecond without a listener. `listening` sets the listener: a `Stopwatch`
(profiler.py), PyTorch's profiler (trace.py) or the memory forecast. Compiled layers and captured passes
contain no spans, because nothing can be timed inside them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Listener = Callable[[str], AbstractContextManager[Any]]

# A plain variable, because a ContextVar would be unset in the thread that runs backward on a GPU.
_listener: Listener | None = None
_SILENT = nullcontext()
_END = object()


def span(name: str) -> AbstractContextManager[Any]:
    """The context manager of a named part of the step. A dot names a detail: `forward_pass.agent_0`."""
    return _SILENT if _listener is None else _listener(name)


def each_in_span(name: str, items: Iterator[T]) -> Iterator[T]:
    """Yield the items; fetching each one is a span."""
    while True:
        with span(name):
            item = next(items, _END)
        if item is _END:
            return
        yield item  # pyright: ignore[reportReturnType]


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within it, `listener(name)` is the context manager of every span of this process."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@dataclass
class Span:
    """A timed span: clock marks (seconds, or events on a GPU), and the spans inside."""

    name: str
    begin: Any
    end: Any = None
    inner: list["Span"] = field(default_factory=list)

    def seconds(self) -> float:
        """Duration. On a GPU the device must have reached the end."""
        if isinstance(self.begin, float):
            return self.end - self.begin
        return self.begin.elapsed_time(self.end) / 1000

    def own_seconds(self) -> float:
        """Duration without the parts inside, so that the parts of a step add up to the step. Details are not
        subtracted.
        """
        return self.seconds() - _parts_inside(self)

    def everything_inside(self) -> Iterator["Span"]:
        """Parts and details, in depth-first order."""
        for inner in self.inner:
            yield inner
            yield from inner.everything_inside()


def _parts_inside(span: Span) -> float:
    return sum(_parts_inside(inner) if "." in inner.name else inner.seconds() for inner in span.inner)


class Stopwatch:
    """Times spans by the host's clock, or by events on a GPU, which wait only when they are read."""

    def __init__(self, device: torch.device):
        self._mark = _event if device.type == "cuda" else perf_counter
        self._open: list[Span] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[Span]:
        if self._open and self._open[-1].name == "backward_pass":
            yield self._open[-1]  # passes that backward recomputes count as backward
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
