"""A decoding step as a CUDA graph: thousands of short kernels, launched as one.

With few texts, launching the kernels one by one takes longer than running them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
