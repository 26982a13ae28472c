"""A frozen linear layer with the adapters of several agents: one call for all of them, forward and backward.

Rows of the agents lie one after the other (agent-major), so the base's product is one large matrix product and LoRA's
thin ones are batched over agents. The thin product is written first and the large one added to it: it has arithmetic
enough to hide reading what it adds to, and the thin one has not.
"""

from typing import Any

import torch
from torch import Tensor

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
