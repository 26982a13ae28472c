"""CUDA graphs of a training pass: the launches of forward and of backward, recorded once and replayed whole.

With few tokens a pass is some thousand short kernels, and the host that launches them one by one is three times slower
than the GPU. What is random or of changing shape stays outside: weights arrive masked and cast, the loss comes after.
"""

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chorus.spans import span

MAX_RECORDINGS = 8  # each keeps its rows' inputs and outputs; other shapes run unrecorded

Pass = Callable[[Tensor, Tensor, Any], Tensor]  # ids_NT, flat_KF, attention masks (None: the trunk makes them)


@dataclass
class _Recording:
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    ids_NT: Tensor
    flat_KF: Tensor
    hidden_NTD: Tensor
    hidden_gradient_NTD: Tensor
    masks: Any  # held, because a replay reads them
    flat_gradient_KF: Tensor


@dataclass
class RecordedPasses:
    """Passes by graph. Their intermediate tensors share one pool of memory: only one pass may await its backward.

    A pass while another does so, and one of a shape beyond the first `MAX_RECORDINGS`, runs as it would without graphs.
    """

    masks_of: Callable[[Tensor], Any]  # a copy from the host, such as of a mask's zero, is refused while recording
    recordings: dict[Hashable, _Recording] = field(default_factory=dict)
    awaiting: weakref.ref[Tensor] | None = None

    def __call__(self, key: Hashable, run: Pass, ids_NT: Tensor, flat_KF: Tensor) -> Tensor:
        """`run(ids_NT, flat_KF, None)`, which must do the same for all arguments of an equal `key`."""
        is_awaited = self.awaiting is not None and self.awaiting() is not None
        if is_awaited or (key not in self.recordings and len(self.recordings) == MAX_RECORDINGS):
            return run(ids_NT, flat_KF, None)
        if key not in self.recordings:
            pool = next((recording.forward.pool() for recording in self.recordings.values()), None)
            with span("recording"):
                self.recordings[key] = _record(run, ids_NT, flat_KF, self.masks_of(ids_NT), pool)
        hidden_NTD: Tensor = _Replayed.apply(self, self.recordings[key], ids_NT, flat_KF)  # pyright: ignore
        if hidden_NTD.requires_grad:
            self.awaiting = weakref.ref(hidden_NTD)
        return hidden_NTD


class _Replayed(torch.autograd.Function):
    """What leaves a graph is copied: its own tensors are written again by the next replay."""

    @staticmethod
    def forward(ctx: Any, passes: RecordedPasses, recording: _Recording, ids_NT: Tensor, flat_KF: Tensor) -> Tensor:
        ctx.passes, ctx.recording = passes, recording
        recording.ids_NT.copy_(ids_NT)
        recording.flat_KF.detach().copy_(flat_KF)
        recording.forward.replay()
        return recording.hidden_NTD.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        recording: _Recording = ctx.recording
        recording.hidden_gradient_NTD.copy_(gradients[0])
        recording.backward.replay()
        ctx.passes.awaiting = None
        return None, None, None, recording.flat_gradient_KF.clone()


@torch.enable_grad()
def _record(run: Pass, ids_NT: Tensor, flat_KF: Tensor, masks: Any, pool: Any) -> _Recording:
    ids_NT, flat_KF = ids_NT.clone(), flat_KF.detach().clone().requires_grad_()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles and sizes workspaces, which a recording must not
        for _ in range(2):
            hidden_NTD = run(ids_NT, flat_KF, masks)
            torch.autograd.grad(hidden_NTD, flat_KF, torch.zeros_like(hidden_NTD))
            del hidden_NTD
    torch.cuda.current_stream().wait_stream(aside)
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's watchdog or one that pins memory, may call CUDA meanwhile: not an error of ours.
    with torch.cuda.graph(forward, pool=pool, capture_error_mode="thread_local"):
        hidden_NTD = run(ids_NT, flat_KF, masks)
    gradient_NTD = torch.zeros_like(hidden_NTD)
    with torch.cuda.graph(backward, pool=forward.pool(), capture_error_mode="thread_local"):
        (flat_gradient_KF,) = torch.autograd.grad(hidden_NTD, flat_KF, gradient_NTD)
    return _Recording(forward, backward, ids_NT, flat_KF, hidden_NTD.detach(), gradient_NTD, masks, flat_gradient_KF)
