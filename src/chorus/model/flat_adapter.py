"""An agent's adapter as one flat parameter of F numbers: every A and B, concatenated.

Engines and optimizers have a cost for each tensor: a reduction hook, a copy into a bucket, an entry in the
lists of clipping and AdamW. Gemma-2-2b has 364 matrices for each agent; sixteen agents are sixteen tensors
instead of 5,824.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors  # loops in C++
from torch.autograd.function import once_differentiable

Matrix = tuple[str, Literal["A", "B"]]  # PEFT's path of the layer, and which of its two


class Layout:
    """The position of each matrix in a flat adapter: in the model's order, A before B; the same for all
    agents.
    """

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

    def is_B(self, device: torch.device) -> Tensor:
        """is_B_F: True for the numbers of a flat adapter that belong to a B."""
        sizes = zip(self.shapes, self._sizes, strict=True)
        return torch.cat([torch.full((size,), letter == "B", device=device) for (_, letter), size in sizes])

    def join(self, matrices: Mapping[Matrix, Tensor]) -> Tensor:
        """A new flat_F of these matrices: the counterpart of `views`."""
        return _flatten_dense_tensors([matrices[key] for key in self.shapes])


class _Split(torch.autograd.Function):
    """A split with one gradient: autograd's views would add each part to a zero tensor of full size."""

    @staticmethod
    def forward(ctx: Any, flat_KF: Tensor, shapes: Iterable[torch.Size]) -> tuple[Tensor, ...]:
        pieces = flat_KF.detach().split([shape.numel() for shape in shapes], dim=1)
        return tuple(piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1), None


class Factors(NamedTuple):
    """The factors on one agent's weights in a pass, in the weights' dtype.

    Attributes:
        keep_F: DropConnect's mask (Wan et al. 2013): a weight is kept where it is True. None: it is off.
        keep_p: a kept weight is divided by it.
        gain_of_B: B is multiplied by it. is_B_F says which numbers are B's; it may be missing where the gain
            is 1.
    """

    keep_F: Tensor | None = None
    keep_p: float = 1.0
    gain_of_B: float = 1.0
    is_B_F: Tensor | None = None

    def times(self, flat_F: Tensor, in_place: bool = False) -> Tensor:
        """`flat_F` times all of them; `flat_F` itself where they are 1."""
        if self.keep_F is not None:
            kept_F = flat_F.mul_(self.keep_F) if in_place else flat_F * self.keep_F
            flat_F = kept_F.div_(self.keep_p)
        if self.gain_of_B != 1.0:
            assert self.is_B_F is not None
            flat_F = torch.where(self.is_B_F, flat_F * self.gain_of_B, flat_F)
        return flat_F


def stack(adapters: Sequence[Tensor], dtype: torch.dtype, factors: Sequence[Factors] | None = None) -> Tensor:
    """Flat adapters of several agents as flat_KF of `dtype`, each times its factors: the weights of one pass.
    The adapters are not modified.
    """
    factors = factors or [Factors()] * len(adapters)
    return _Stack.apply(dtype, factors, *adapters)  # pyright: ignore[reportReturnType]


class _Stack(torch.autograd.Function):
    """Equal to torch.stack and a cast, without a stack in the weights' own, wider dtype."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, factors: Sequence[Factors], *adapters: Tensor) -> Tensor:
        ctx.factors, ctx.dtype = factors, adapters[0].dtype
        flat_KF = adapters[0].new_empty(len(adapters), adapters[0].numel(), dtype=dtype)
        for row_F, adapter_F, own in zip(flat_KF, adapters, factors, strict=True):
            row_F.copy_(own.times(adapter_F))
        return flat_KF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        due: list[Tensor] = []
        for row_F, own in zip(gradients[0], ctx.factors, strict=True):
            # A copy for each parameter to keep: a captured pass overwrites its own gradient at every replay.
            due.append(own.times(row_F.to(ctx.dtype, copy=True), in_place=True))
        return None, None, *due
