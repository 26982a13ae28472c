"""A decoding step as a CUDA graph: some thousand short kernels, launched as one.

While few texts are decoded, the host that launches kernels one by one is slower than the GPU that runs them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class CapturedStep:
    """A step that reads and writes the same tensors every time, captured and replayed."""

    def __init__(self, step: Callable[[], None], counters: Sequence[Tensor]):
        """Capture `step`.

        Args:
            step: works in place. What it writes beside `counters` may be written again.
            counters: what a step changes and the next one reads; they are as before after the capture.
        """
        before = [counter.clone() for counter in counters]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles kernels and sizes workspaces, which a capture must not
            for _ in range(2):
                step()
                for counter, value in zip(counters, before, strict=True):
                    counter.copy_(value)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may call CUDA meanwhile: not an error of ours.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            step()

    def replay(self) -> None:
        """Take one step."""
        self.graph.replay()
