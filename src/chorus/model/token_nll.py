"""Token negative log-likelihood from hidden states, without materialising the logits of a whole batch.

With Gemma's 256,000 tokens of vocabulary, K x B x T x V logits of a small batch are gigabytes. Only rows with
loss are computed, a chunk at a time, and each chunk's gradient with respect to the hidden states is computed
while its logits exist: backward does not recompute them, it only scales rows.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chorus.model.base import Head

CHUNK_ELEMENTS = (
    2**27
)  # logits held at once: 512 rows of 256,000, in bf16 a quarter of a gigabyte; as fast as more
# Up to this soft-cap exp(logits) and its sum cannot over- or underflow in fp32, without subtracting a
# maximum.
SMALL_CAP = 64.0


def token_nll(hidden_BTD: Tensor, target_BT: Tensor, target_rows_N: Tensor, head: Head) -> Tensor:
    """NLL of each target token in nats.

    Args:
        hidden_BTD: after the final norm.
        target_BT: token ids.
        target_rows_N: flat indices into B*T of the tokens on which loss is due.

    Returns:
        nll_BT: fp32, 0 where no loss is due. Its gradient reaches `hidden_BTD` alone: the head is frozen.
    """
    hidden_ND = hidden_BTD.flatten(0, 1)[target_rows_N]
    nll_N: Tensor = _ChunkedNLL.apply(hidden_ND, target_BT.flatten()[target_rows_N], head)  # pyright: ignore
    return (
        torch.zeros(target_BT.numel(), device=nll_N.device)
        .index_put((target_rows_N,), nll_N)
        .view_as(target_BT)
    )


class _ChunkedNLL(torch.autograd.Function):
    """nll_N and, while each chunk's logits exist, its gradient with respect to hidden_ND."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, target_N: Tensor, head: Head) -> Tensor:
        need_gradient = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if need_gradient else None
        nll_N = torch.empty(len(hidden_ND), device=hidden_ND.device)
        chunk = max(1, CHUNK_ELEMENTS // len(head.weight_VD))
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            nll_N[rows], slope_CV = _nll_and_slope(hidden_ND[rows], target_N[rows], head, need_gradient)
            if gradient_ND is not None:
                torch.mm(slope_CV, head.weight_VD, out=gradient_ND[rows])
            del slope_CV  # before the next chunk is made
        ctx.save_for_backward(gradient_ND)
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (gradient_ND,) = ctx.saved_tensors
        (upstream_N,) = gradients
        return (gradient_ND * upstream_N[:, None]).to(gradient_ND.dtype), None, None


def _nll_and_slope(
    hidden_CD: Tensor, target_C: Tensor, head: Head, need_slope: bool
) -> tuple[Tensor, Tensor]:
    """One chunk: nll_C in fp32 and, if needed, d nll / d (head
    output), slope_CV in the dtype of the hidden states."""
    logits_CV = torch.nn.functional.linear(hidden_CD, head.weight_VD, head.bias_V)
    of_logits = _compiled_of_logits() if logits_CV.is_cuda else _of_logits
    return of_logits(logits_CV, target_C, head.softcap, head.scale, need_slope), logits_CV


def _of_logits(
    logits_CV: Tensor, target_C: Tensor, softcap: float | None, scale: float, need_slope: bool
) -> Tensor:
    """nll_C, and the slope written over the logits.

    With z = x / cap, logits = cap · tanh(z): d nll / d x = (softmax − onehot) · (1 − tanh(z)²). For x = scale
    · head output, the gradient by the head output is scale times as large.
    """
    x_CV = logits_CV.float()
    if scale != 1:
        x_CV = x_CV * scale
    tanh_CV = None
    if softcap is not None:
        # by an exponential; a GPU's tanh takes several times as long
        tanh_CV = 2 * torch.sigmoid(x_CV * (2 / softcap)) - 1
        x_CV = tanh_CV * softcap
    is_small = softcap is not None and softcap <= SMALL_CAP
    # logsumexp needs one more pass, for the maximum
    log_norm_C = x_CV.exp().sum(-1).log() if is_small else x_CV.logsumexp(-1)
    nll_C = log_norm_C - x_CV.gather(-1, target_C[:, None]).squeeze(-1)
    if need_slope:
        is_target_CV = torch.arange(x_CV.shape[-1], device=x_CV.device) == target_C[:, None]
        slope_CV = (x_CV - log_norm_C[:, None]).exp() - is_target_CV.float()
        if tanh_CV is not None:
            slope_CV = slope_CV * (1 - tanh_CV.square())
        if scale != 1:
            slope_CV = slope_CV * scale
        logits_CV.copy_(slope_CV)
    return nll_C


@cache
def _compiled_of_logits() -> Callable[..., Tensor]:
    """Two passes over the logits instead of a dozen by PyTorch's operators. Created at its first use:
    importing torch.compile takes a second, and a run without a GPU never needs it.
    """
    return torch.compile(_of_logits)
