"""A decoding step as a CUDA graph: thousands of short kernels, launched as one.

With few texts, launching the kernels one by one takes longer than running them.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from chorus.errors import RunError, first_line, out_of_memory

logger = logging.getLogger(__name__)


class CapturedStep:
    """A step that reads and writes the same tensors every time, captured and replayed."""

    def __init__(self, step: Callable[[], None], counters: Sequence[Tensor]):
        """Capture `step`.

        Args:
            step: works in place. Its outputs, apart from `counters`, may be overwritten.
            counters: tensors that a step changes and the next one reads; the capture restores them.
        """
        before = [counter.clone() for counter in counters]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            aside
        ):  # compiles kernels, and allocates workspaces, which is not allowed in a capture
            for _ in range(2):
                step()
                for counter, value in zip(counters, before, strict=True):
                    counter.copy_(value)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile: not an error here.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            step()

    def replay(self) -> None:
        """Take one step."""
        self.graph.replay()


def captured_if_possible(step: Callable[[], None], counters: Sequence[Tensor]) -> CapturedStep | None:
    """`CapturedStep`; None, with a warning, where a step waits for the device.

    LLM.int8 does, and some experts do: what they compute next depends on values. Such a step is slower
    without a graph, and computes the same.
    """
    before = [counter.clone() for counter in counters]
    try:
        return CapturedStep(step, counters)
    except RunError:
        raise
    except RuntimeError as error:
        if out_of_memory(error) is not None:
            raise
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)
        _tell(first_line(error))
        return None


@cache  # once for each reason: every batch of texts would say it
def _tell(reason: str) -> None:
    logger.warning("a decoding step cannot be captured, so texts are written without CUDA graphs: %s", reason)
