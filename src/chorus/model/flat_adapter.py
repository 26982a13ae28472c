"""An agent's adapter as one flat parameter, F numbers: every A and B, one after the other.

Engines and optimizers pay for each tensor: a reduction's hook, a copy into a bucket, a place in the lists of
clipping and AdamW. Gemma-2-2b has 364 matrices an agent; sixteen agents are sixteen tensors this way, and not
5,824.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors  # loops in C++
from torch.autograd.function import once_differentiable

Matrix = tuple[str, Literal["A", "B"]]  # PEFT's path of the layer, and which of its two


class Layout:
    """Where each matrix lies in a flat adapter: in the model's
    order, A before B; alike for every agent and mode."""

    def __init__(self, shapes: Mapping[Matrix, torch.Size]):
        self.shapes = dict(shapes)
        self._sizes = [shape.numel() for shape in self.shapes.values()]

    def views(self, flat_F: Tensor) -> dict[Matrix, Tensor]:
        """The matrices in `flat_F`: writing to one writes there."""
        pieces = flat_F.split(self._sizes)
        return {
            key: piece.view(shape) for (key, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }

    def stacked(self, flat_KF: Tensor) -> dict[Matrix, Tensor]:
        """The matrices of K agents, as (K, ...) views of `flat_KF`, with a gradient in one piece."""
        pieces: tuple[Tensor, ...] = _Split.apply(flat_KF, self.shapes.values())  # pyright: ignore
        return dict(zip(self.shapes, pieces, strict=True))

    def join(self, matrices: Mapping[Matrix, Tensor]) -> Tensor:
        """A new flat_F of these matrices: the counterpart of `views`."""
        return _flatten_dense_tensors([matrices[key] for key in self.shapes])


class _Split(torch.autograd.Function):
    """Autograd's own views would add each gradient to a zero tensor of the whole."""

    @staticmethod
    def forward(ctx: Any, flat_KF: Tensor, shapes: Iterable[torch.Size]) -> tuple[Tensor, ...]:
        pieces = flat_KF.detach().split([shape.numel() for shape in shapes], dim=1)
        return tuple(piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1), None


def stack(
    adapters: Sequence[nn.Parameter],
    dtype: torch.dtype,
    keeps: Sequence[Tensor] | None = None,
    keep_p: float = 1.0,
) -> Tensor:
    """Flat adapters of several agents as flat_KF of `dtype`: the weights of one pass. They themselves are not
    written.

    DropConnect (Wan et al. 2013), where `keeps` has a mask for each: a weight is kept where it is True and
    divided by `keep_p`, in the weights' own dtype.
    """
    return _Stack.apply(dtype, keeps, keep_p, *adapters)  # pyright: ignore[reportReturnType]


class _Stack(torch.autograd.Function):
    """As torch.stack and a cast, without a stack of the weights in their own, wider dtype."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, keeps: Sequence[Tensor] | None, keep_p: float, *adapters: Tensor
    ) -> Tensor:
        ctx.keeps, ctx.keep_p, ctx.dtype = keeps or [None] * len(adapters), keep_p, adapters[0].dtype
        flat_KF = adapters[0].new_empty(len(adapters), adapters[0].numel(), dtype=dtype)
        for row_F, adapter_F, keep_F in zip(flat_KF, adapters, ctx.keeps, strict=True):
            row_F.copy_(adapter_F if keep_F is None else (adapter_F * keep_F).div_(keep_p))
        return flat_KF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        due: list[Tensor] = []
        for row_F, keep_F in zip(gradients[0], ctx.keeps, strict=True):
            # A copy each, which the parameter may keep: a recorded pass writes over its own gradient at every
            # replay.
            gradient_F = row_F.to(ctx.dtype, copy=True)
            due.append(gradient_F if keep_F is None else gradient_F.mul_(keep_F).div_(ctx.keep_p))
        return None, None, None, *due
