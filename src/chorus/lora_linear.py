"""A frozen linear layer with the adapters of several agents: one call for all of them, forward and backward.

Rows of the agents lie one after the other (agent-major), so the base's product is one large matrix product and LoRA's
thin ones are batched over agents. The thin product is written first and the large one added to it: it has arithmetic
enough to hide reading what it adds to, and the thin one has not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # loops in C++
from torch.autograd.function import once_differentiable

# Registered operators, and not an autograd.Function alone: torch.compile takes them as they are. Traced through, the
# addition in place would become a copy.


@torch.library.custom_op("chorus::lora_linear", mutates_args=())
def _forward(
    x_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_KRI: Tensor, B_KOR: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    low_KNR = torch.bmm(x_KNI, A_KRI.mT)
    y_KNO = _scaled_bmm(low_KNR, B_KOR.mT, scaling)
    if bias_O is not None:
        y_KNO += bias_O
    y_KNO.flatten(0, 1).addmm_(x_KNI.flatten(0, 1), weight_OI.T)
    return y_KNO, low_KNR


def _scaled_bmm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return a.new_empty(len(a), a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scaling)


@_forward.register_fake
def _(x_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_KRI: Tensor, B_KOR: Tensor, scaling: float):
    K, N, _ = x_KNI.shape
    return x_KNI.new_empty(K, N, len(weight_OI)), x_KNI.new_empty(K, N, A_KRI.shape[1])


@torch.library.custom_op("chorus::lora_linear_backward", mutates_args=())
def _backward(
    dy_KNO: Tensor,
    x_KNI: Tensor,
    low_KNR: Tensor,
    weight_OI: Tensor,
    A_KRI: Tensor,
    B_KOR: Tensor,
    scaling: float,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dlow_KNR = _scaled_bmm(dy_KNO, B_KOR, scaling)
    dA_KRI = torch.bmm(dlow_KNR.mT, x_KNI)
    dB_KOR = _scaled_bmm(dy_KNO.mT, low_KNR, scaling)
    if not need_dx:
        return dy_KNO.new_empty(0), dA_KRI, dB_KOR
    dx_KNI = torch.bmm(dlow_KNR, A_KRI)
    dx_KNI.flatten(0, 1).addmm_(dy_KNO.flatten(0, 1), weight_OI)
    return dx_KNI, dA_KRI, dB_KOR


@_backward.register_fake
def _(
    dy_KNO: Tensor,
    x_KNI: Tensor,
    low_KNR: Tensor,
    weight_OI: Tensor,
    A_KRI: Tensor,
    B_KOR: Tensor,
    scaling: float,
    need_dx: bool,
):
    dx_KNI = x_KNI.new_empty(x_KNI.shape if need_dx else 0)
    return dx_KNI, A_KRI.new_empty(A_KRI.shape), B_KOR.new_empty(B_KOR.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x_KNI, weight_OI, _, A_KRI, B_KOR, ctx.scaling = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_KNI, output[1], weight_OI, A_KRI, B_KOR)


def _gradient(ctx: Any, dy_KNO: Tensor, _: None) -> tuple[Tensor | None, ...]:
    need_dx = ctx.needs_input_grad[0]
    dx_KNI, dA_KRI, dB_KOR = _backward(dy_KNO.contiguous(), *ctx.saved_tensors, ctx.scaling, need_dx)
    return dx_KNI if need_dx else None, None, None, dA_KRI, dB_KOR, None


_forward.register_autograd(_gradient, setup_context=_save)


def lora_linear(
    x_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_KRI: Tensor, B_KOR: Tensor, scaling: float
) -> Tensor:
    """y_KNO = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ (Hu et al. 2021), agent k by A_RI and B_OR of its own.

    All tensors have one dtype. Gradients reach x, A and B; W and bias are frozen. Kept for backward: x, its low-rank
    image and the weights.
    """
    return _forward(x_KNI, weight_OI, bias_O, A_KRI, B_KOR, scaling)[0]


def flatten(
    weights: Sequence[nn.Parameter], num_agents: int, dtype: torch.dtype, keep_KF: Tensor | None, keep_p: float
) -> Tensor:
    """All matrices of `num_agents` agents, given agent by agent, as flat_KF of `dtype`.

    Few launches for some thousand tensors; in backward their gradients are views of one buffer. DropConnect (Wan et al.
    2013), where `keep_KF` is given: a weight is kept where it is True and divided by `keep_p`, in the weights' own
    dtype. The weights themselves are never written.
    """
    return _Flatten.apply(num_agents, dtype, keep_KF, keep_p, *weights)  # pyright: ignore[reportReturnType]


class _Flatten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, num_agents: int, dtype: torch.dtype, keep_KF: Tensor | None, keep_p: float, *weights: Tensor
    ) -> Tensor:
        ctx.weights, ctx.keep_p = weights, keep_p  # for their shapes and dtype
        ctx.save_for_backward(keep_KF)
        flat_KF = _flatten_dense_tensors(weights).view(num_agents, -1)
        if keep_KF is not None:
            flat_KF.mul_(keep_KF).div_(keep_p)
        return flat_KF.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (keep_KF,) = ctx.saved_tensors
        flat_KF = gradients[0].to(ctx.weights[0].dtype, copy=True)
        if keep_KF is not None:
            flat_KF.mul_(keep_KF).div_(ctx.keep_p)
        return None, None, None, None, *_unflatten_dense_tensors(flat_KF.flatten(), ctx.weights)


def split(flat_KF: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """The matrices in flat_KF, as (K, ...) for each shape of one agent's: views of it, with a gradient in one piece."""
    return _Split.apply(flat_KF, shapes)  # pyright: ignore[reportReturnType]


class _Split(torch.autograd.Function):
    """Autograd's own views would add each gradient to a zero tensor of the whole."""

    @staticmethod
    def forward(ctx: Any, flat_KF: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
        pieces = flat_KF.detach().split([shape.numel() for shape in shapes], dim=1)
        return tuple(piece.unflatten(1, shape) for piece, shape in zip(pieces, shapes, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.cat([gradient.flatten(1) for gradient in gradients], dim=1), None
