"""Frozen linear layers with the adapters of several agents: one call for all of them, forward and backward.

The agents' rows are concatenated (agent-major), so the base's product is one large matrix product and LoRA's
thin ones are batched over agents. The thin product is written first and the large one accumulates onto it:
the large one has enough arithmetic to hide the extra read, the thin one has not.

A thin product takes as long as reading or writing its wide side. So linears with the same input, such as
attention's q, k and v, are one call where possible (`joined_linears`): x is read, and its gradient written,
once for all of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Registered operators, not only an autograd.Function: torch.compile does not trace into them; traced, the
# addition in place would become a copy. Compiled code cached on disk is looked up by their names, so an
# operator whose backward changes needs a new name.


@torch.library.custom_op("chorus::lora_linear", mutates_args=())
def _forward(
    x_KNI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_KRI: Tensor, B_KOR: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    low_KNR = torch.bmm(x_KNI, A_KRI.mT)
    return _product(x_KNI, low_KNR, weight_OI, bias_O, B_KOR, scaling), low_KNR


def _product(
    x_KNI: Tensor, low_KNR: Tensor, weight_OI: Tensor, bias_O: Tensor | None, B_KOR: Tensor, scaling: float
) -> Tensor:
    y_KNO = _scaled_bmm(low_KNR, B_KOR.mT, scaling)
    if bias_O is not None:
        y_KNO += bias_O
    y_KNO.flatten(0, 1).addmm_(x_KNI.flatten(0, 1), weight_OI.T)
    return y_KNO


def _scaled_bmm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return a.new_empty(len(a), a.shape[1], b.shape[2]).baddbmm_(a, b, beta=0, alpha=scaling)


@_forward.register_fake
def _(x_KNI, weight_OI, bias_O, A_KRI, B_KOR, scaling):
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
def _(dy_KNO, x_KNI, low_KNR, weight_OI, A_KRI, B_KOR, scaling, need_dx):
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

    All tensors have one dtype. Gradients reach x, A and B; W and bias are frozen. Saved for backward: x, x Aᵀ
    and the weights.
    """
    return _forward(x_KNI, weight_OI, bias_O, A_KRI, B_KOR, scaling)[0]


@torch.library.custom_op("chorus::lora_linears", mutates_args=())
def _forward_of_several(
    x_KNI: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scaling: float
) -> list[Tensor]:
    """`_forward` for several layers without bias: every y_KNO, then the x Aᵀ of all, concatenated."""
    low_KNR = torch.bmm(x_KNI, torch.cat(list(As), dim=1).mT)
    layers = zip(low_KNR.split(_ranks(As), dim=2), weights, Bs, strict=True)
    return [
        *(_product(x_KNI, low, weight_OI, None, B_KOR, scaling) for low, weight_OI, B_KOR in layers),
        low_KNR,
    ]


def _ranks(As: Sequence[Tensor]) -> list[int]:
    return [A_KRI.shape[1] for A_KRI in As]


@_forward_of_several.register_fake
def _(x_KNI, weights, As, Bs, scaling):
    K, N, _ = x_KNI.shape
    return [x_KNI.new_empty(K, N, width) for width in (*map(len, weights), sum(_ranks(As)))]


@torch.library.custom_op("chorus::lora_linears_backward", mutates_args=())
def _backward_of_several(
    dys: Sequence[Tensor],
    x_KNI: Tensor,
    low_KNR: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scaling: float,
    need_dx: bool,
) -> list[Tensor]:
    """The summed dx, the concatenated gradients of all A, and every dB."""
    dlow_KNR = torch.empty_like(low_KNR)
    lows, dlows = (low.split(_ranks(As), dim=2) for low in (low_KNR, dlow_KNR))
    for dlow, dy_KNO, B_KOR in zip(dlows, dys, Bs, strict=True):
        dlow.baddbmm_(dy_KNO, B_KOR, beta=0, alpha=scaling)
    dA_KRI = torch.bmm(dlow_KNR.mT, x_KNI)
    dBs = [_scaled_bmm(dy_KNO.mT, low, scaling) for dy_KNO, low in zip(dys, lows, strict=True)]
    if not need_dx:
        return [x_KNI.new_empty(0), dA_KRI, *dBs]
    dx_KNI = torch.bmm(dlow_KNR, torch.cat(list(As), dim=1))
    for dy_KNO, weight_OI in zip(dys, weights, strict=True):
        dx_KNI.flatten(0, 1).addmm_(dy_KNO.flatten(0, 1), weight_OI)
    return [dx_KNI, dA_KRI, *dBs]


@_backward_of_several.register_fake
def _(dys, x_KNI, low_KNR, weights, As, Bs, scaling, need_dx):
    dA_KRI = x_KNI.new_empty(len(x_KNI), low_KNR.shape[2], x_KNI.shape[2])
    return [
        x_KNI.new_empty(x_KNI.shape if need_dx else 0),
        dA_KRI,
        *(B_KOR.new_empty(B_KOR.shape) for B_KOR in Bs),
    ]


def _save_of_several(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    x_KNI, weights, As, Bs, ctx.scaling = inputs
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(x_KNI, output[-1], *weights, *As, *Bs)


def _gradient_of_several(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    need_dx, dys = ctx.needs_input_grad[0], [dy_KNO.contiguous() for dy_KNO in gradients[:-1]]
    x_KNI, low_KNR, *of_layers = ctx.saved_tensors
    weights, As, Bs = (of_layers[kind * len(dys) : (kind + 1) * len(dys)] for kind in range(3))
    dx_KNI, dA_KRI, *dBs = _backward_of_several(dys, x_KNI, low_KNR, weights, As, Bs, ctx.scaling, need_dx)
    return dx_KNI if need_dx else None, [None] * len(dys), list(dA_KRI.split(_ranks(As), dim=1)), dBs, None


_forward_of_several.register_autograd(_gradient_of_several, setup_context=_save_of_several)

# As they appear in a trace.
ONE, SEVERAL = torch.ops.chorus.lora_linear.default, torch.ops.chorus.lora_linears.default
