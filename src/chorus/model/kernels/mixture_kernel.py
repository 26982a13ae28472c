"""Statistics of a mixture of K next-token distributions: most probable token, entropy, and the members'
disagreement.

The mixture is pooled in probability space and then, where it has a temperature, sharpened or flattened:

    p(v) = sum_k w_k p_k(v),    q(v) = p(v)^(1/T) / sum_u p(u)^(1/T)

With a vocabulary of 256,000 the logits of K members are the largest tensors of a decoding step. They are read
twice in the head's dtype, and nothing of their size is written: the first pass computes each member's
normaliser and entropy, the second one pools.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MixtureStatistics(NamedTuple):
    """Of N next-token distributions, each pooled from K members; natural logarithms, fp32.

    Attributes:
        token_N: the most probable token, int64.
        log_prob_N: log q of that token.
        member_log_prob_KN: its log-probability under each member.
        entropy_N: of the mixture at its temperature: the total uncertainty.
        mutual_information_N: H(p) - sum_k w_k H(p_k), of the mixture before its temperature: how much of the
            uncertainty comes from the members' disagreement (Depeweg et al. 2018). From 0 to log K.
        log_norm_KN: logsumexp of each member's logits.
        log_partition_N: log sum_v p(v)^(1/T), 0 at temperature 1.
        log_prob_NV: log q; None unless it was asked for.
    """

    token_N: Tensor
    log_prob_N: Tensor
    member_log_prob_KN: Tensor
    entropy_N: Tensor
    mutual_information_N: Tensor
    log_norm_KN: Tensor
    log_partition_N: Tensor
    log_prob_NV: Tensor | None


def mixture_statistics(
    logits_KNV: Tensor,
    weight_K: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    want_log_prob: bool = False,
) -> MixtureStatistics:
    """Statistics of the members' mixture.

    Args:
        logits_KNV: the head's output, of any floating-point dtype, before scale and soft-cap.
        weight_K: fp32, summing to 1; a weight may be 0.
        temperature: of the pooled distribution, above 0.
        softcap, scale: logits are softcap * tanh(z / softcap) of z = scale * output, or z itself; see
        `base.Head`.
        want_log_prob: also write log q, N x V numbers in fp32, to sample from.
    """
    how = {"temperature": temperature, "softcap": softcap, "scale": scale, "want_log_prob": want_log_prob}
    if not logits_KNV.is_cuda:
        return torch_statistics(logits_KNV, weight_K, **how)
    from chorus.model.kernels.mixture_triton import triton_statistics  # Triton is installed where CUDA is

    return MixtureStatistics(*triton_statistics(logits_KNV, weight_K, **how))


def torch_statistics(
    logits_KNV: Tensor,
    weight_K: Tensor,
    *,
    temperature: float,
    softcap: float | None,
    scale: float,
    want_log_prob: bool,
) -> MixtureStatistics:
    """`mixture_statistics` in plain PyTorch, for the CPU."""
    x_KNV = capped(logits_KNV, softcap, scale)
    log_norm_KN = x_KNV.logsumexp(-1)
    log_prob_KNV = x_KNV - log_norm_KN[:, :, None]
    entropy_KN = entropy_of(log_prob_KNV)
    pooled_NV = (log_prob_KNV + weight_K.log()[:, None, None]).logsumexp(0)
    pooled_entropy_N = entropy_of(pooled_NV)
    mutual_information_N = (pooled_entropy_N - (weight_K[:, None] * entropy_KN).sum(0)).clamp(min=0)
    log_partition_N = torch.zeros_like(pooled_entropy_N)
    entropy_N = pooled_entropy_N
    if temperature != 1:
        pooled_NV = pooled_NV / temperature
        log_partition_N = pooled_NV.logsumexp(-1)
        pooled_NV = pooled_NV - log_partition_N[:, None]
        entropy_N = entropy_of(pooled_NV)
    token_N = pooled_NV.argmax(-1)
    log_prob_N, member_KN = chosen_log_probs(
        logits_KNV,
        token_N,
        weight_K,
        log_norm_KN,
        log_partition_N,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
    )
    return MixtureStatistics(
        token_N,
        log_prob_N,
        member_KN,
        entropy_N,
        mutual_information_N,
        log_norm_KN,
        log_partition_N,
        pooled_NV if want_log_prob else None,
    )


def capped(output: Tensor, softcap: float | None, scale: float) -> Tensor:
    """fp32 logits of the head's output."""
    logits = output.float() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def entropy_of(log_prob_V: Tensor) -> Tensor:
    """-sum p log p over the last dimension, nats; a probability of 0 adds nothing."""
    return torch.special.entr(log_prob_V.exp()).sum(-1)


def chosen_log_probs(
    logits_KNV: Tensor,
    token_N: Tensor,
    weight_K: Tensor,
    log_norm_KN: Tensor,
    log_partition_N: Tensor,
    *,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """log q of one token in each distribution, and each member's own log-probability of it: two tensors, N
    and K x N.

    Computed in log space from K numbers a token: exact also where every member's probability underflows.
    """
    index_KN1 = token_N.expand(logits_KNV.shape[:2])[:, :, None]
    member_KN = capped(logits_KNV.gather(-1, index_KN1)[:, :, 0], softcap, scale) - log_norm_KN
    pooled_N = (member_KN + weight_K.log()[:, None]).logsumexp(0)
    return pooled_N / temperature - log_partition_N, member_KN
