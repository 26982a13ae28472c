"""CUDA graphs of a training pass: the kernel launches of forward and backward, captured once and replayed.

With few tokens a pass is thousands of short kernels, and launching them one by one takes three times as long
as running them. Random or changing shapes stay outside: weights are passed in masked and cast, and the loss
follows.
"""

import logging
import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from chorus.errors import RunError, first_line, out_of_memory
from chorus.spans import span

logger = logging.getLogger(__name__)

MAX_CAPTURES = 8  # each keeps its inputs and outputs; further shapes run without a graph


class Rows(NamedTuple):
    """The inputs of a pass, for all its agents: as in `data.Batch`, N = K x B."""

    ids_NT: Tensor
    position_NT: Tensor | None
    sample_NT: Tensor | None

    def copied(self) -> "Rows":
        """The rows in tensors of their own."""
        tensors = (None if tensor is None else tensor.clone() for tensor in self)
        return Rows(*tensors)  # pyright: ignore[reportArgumentType]


Pass = Callable[[Rows, Tensor, Any], Tensor]  # rows, flat_KF, attention masks (None: the pass makes them)


@dataclass
class _Capture:
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    rows: Rows
    flat_KF: Tensor
    hidden_NTD: Tensor
    hidden_gradient_NTD: Tensor
    masks: Any  # kept alive, because a replay reads them
    flat_gradient_KF: Tensor


@dataclass
class CapturedPasses:
    """Passes as CUDA graphs. Their intermediate tensors share one memory pool, so only one pass may await its
    backward.

    A second such pass, and shapes beyond the first `MAX_CAPTURES`, run without graphs.

    Attributes:
        masks_of: precomputed masks, none of them None: the masks that the trunk would make differ during a
            capture.
        may_fall_back: if a pass cannot be captured, warn, and run all passes without graphs from then on.
    """

    masks_of: Callable[[Rows], Any]
    may_fall_back: bool = False
    captures: dict[Hashable, _Capture] = field(default_factory=dict)
    awaiting: weakref.ref[Tensor] | None = None
    has_failed: bool = False

    def __call__(self, key: Hashable, run: Pass, rows: Rows, flat_KF: Tensor) -> Tensor:
        """`run(rows, flat_KF, None)`, which must compute the same for all calls with an equal `key`.

        Raises:
            RunError: the pass cannot be captured, and may not fall back.
        """
        is_awaited = self.awaiting is not None and self.awaiting() is not None
        if (
            key not in self.captures
            and not is_awaited
            and not self.has_failed
            and len(self.captures) < MAX_CAPTURES
        ):
            self._add(key, run, rows, flat_KF)
        if is_awaited or key not in self.captures:
            return run(rows, flat_KF, None)
        hidden_NTD: Tensor = _Replayed.apply(self, self.captures[key], rows, flat_KF)  # pyright: ignore
        if hidden_NTD.requires_grad:
            self.awaiting = weakref.ref(hidden_NTD)
        return hidden_NTD

    def _add(self, key: Hashable, run: Pass, rows: Rows, flat_KF: Tensor) -> None:
        pool = next((capture.forward.pool() for capture in self.captures.values()), None)
        N, T = rows.ids_NT.shape
        start = time.perf_counter()
        logger.info("preparing passes of %d rows of %d tokens: layers are compiled, then captured", N, T)
        try:
            with span("recording"):
                self.captures[key] = _capture(run, rows.copied(), flat_KF, self.masks_of, pool)
        except RunError:
            raise
        except RuntimeError as error:
            if out_of_memory(error) is not None:  # within a capture another error is raised on top of it
                raise
            reason = first_line(error)
            if not self.may_fall_back:
                raise RunError(
                    f"key 'cuda_graphs': a pass cannot be captured: {reason}; set it to false"
                ) from error
            logger.warning(
                "cuda_graphs auto: a pass cannot be captured, so passes run without graphs: %s", reason
            )
            self.has_failed = True
        else:
            logger.info("ready after %.0f s", time.perf_counter() - start)


class _Replayed(torch.autograd.Function):
    """Outputs of a graph are copied: the next replay overwrites its own tensors."""

    @staticmethod
    def forward(ctx: Any, passes: CapturedPasses, capture: _Capture, rows: Rows, flat_KF: Tensor) -> Tensor:
        ctx.passes, ctx.capture = passes, capture
        fill(capture.rows, capture.masks, rows, passes.masks_of)
        capture.flat_KF.detach().copy_(flat_KF)
        capture.forward.replay()
        return capture.hidden_NTD.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        capture: _Capture = ctx.capture
        capture.hidden_gradient_NTD.copy_(gradients[0])
        capture.backward.replay()
        ctx.passes.awaiting = None
        return None, None, None, capture.flat_gradient_KF.clone()


def fill(into: Rows, masks: Any, rows: Rows, masks_of: Callable[[Rows], Any]) -> None:
    """Copy `rows` into the rows that a graph reads, and likewise their masks where packing changes them."""
    for old, new in zip(into, rows, strict=True):
        if old is not None and new is not None:
            old.copy_(new)
    if into.sample_NT is not None:  # a flex mask also reads `into` itself
        for old, new in zip(_tensors(masks), _tensors(masks_of(into)), strict=True):
            old.copy_(new)


def _tensors(masks: Any) -> list[Tensor]:
    match masks:
        case dict():
            return [tensor for key in sorted(masks) for tensor in _tensors(masks[key])]
        case BlockMask():
            return [part for part in masks.as_tuple() if isinstance(part, Tensor)]
        case _:
            return [] if masks is None else [masks]


@torch.enable_grad()
def _capture(run: Pass, rows: Rows, flat_KF: Tensor, masks_of: Callable[[Rows], Any], pool: Any) -> _Capture:
    flat_KF, masks = flat_KF.detach().clone().requires_grad_(), masks_of(rows)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles, and allocates workspaces, which is not allowed in a capture
        for _ in range(2):
            hidden_NTD = run(rows, flat_KF, masks)
            torch.autograd.grad(hidden_NTD, flat_KF, torch.zeros_like(hidden_NTD))
            del hidden_NTD
    torch.cuda.current_stream().wait_stream(aside)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog or one that pins memory, may call CUDA meanwhile: not an error
    # here.
    with torch.cuda.stream(
        torch.cuda.current_stream()
    ):  # a failed capture leaves its stream as the current one
        with torch.cuda.graph(forward, pool=pool, capture_error_mode="thread_local"):
            hidden_NTD = run(rows, flat_KF, masks)
        gradient_NTD = torch.zeros_like(hidden_NTD)
        with torch.cuda.graph(backward, pool=forward.pool(), capture_error_mode="thread_local"):
            (flat_gradient_KF,) = torch.autograd.grad(hidden_NTD, flat_KF, gradient_NTD)
    return _Capture(
        forward, backward, rows, flat_KF, hidden_NTD.detach(), gradient_NTD, masks, flat_gradient_KF
    )
