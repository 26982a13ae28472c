"""Statistics of a predictive distribution: probability, entropy, disagreement. Each is defined once, here.

A distribution is over the vocabulary (of the next token) or over the choices of a question. A mixture of K
members with weights w is pooled in probability space and then, where it has a temperature T, sharpened or
flattened:

    p(v) = sum_k w_k p_k(v),    q(v) = p(v)^(1/T) / sum_u p(u)^(1/T)

A single member is a mixture of one. Logarithms are natural.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.ensemble.mixture import mixture_log_prob
from chorus.ensemble.texts import Answer

UNCERTAINTIES = ("max_p", "entropy", "mutual_information", "disagreement")


class Predictions(NamedTuple):
    """Statistics of N predictive distributions and their N actual outcomes; fp32.

    Attributes:
        log_prob_N: log q of the outcome.
        entropy_N: H(q), the total uncertainty, nats.
        mutual_information_N: H(p) - sum_k w_k H(p_k), of the mixture before its temperature: what of the
            uncertainty is the members' disagreement (Depeweg et al. 2018). From 0 to log K; 0 for a single
            member.
        max_log_prob_N: log q of the most probable outcome.
        is_top_N: whether the most probable outcome came true.
        brier_N: sum_v (q(v) - [v came true])^2 (Brier 1950). From 0 to 2.
    """

    log_prob_N: Tensor
    entropy_N: Tensor
    mutual_information_N: Tensor
    max_log_prob_N: Tensor
    is_top_N: Tensor
    brier_N: Tensor


class AnswerUncertainty(NamedTuple):
    """How sure an answerer is of a text that it has written.

    Attributes:
        probability: of the answer: the product over its tokens, an end token included.
        token_probability: their geometric mean, which does not fall with the answer's length.
        entropy: the mean over its tokens, nats: the total uncertainty.
        mutual_information: likewise, the part of it that is the members' disagreement; 0 for a single member.
        largest_mutual_information: of one token.
        member_probabilities: the answer's probability under each member.
    """

    probability: float
    token_probability: float
    entropy: float
    mutual_information: float
    largest_mutual_information: float
    member_probabilities: tuple[float, ...]


def uncertainty_of(answer: Answer) -> AnswerUncertainty:
    """The uncertainty of an answer; an answer without tokens counts as certain."""
    count = max(1, len(answer.log_probs))
    log_prob = math.fsum(answer.log_probs)
    return AnswerUncertainty(
        math.exp(log_prob),
        math.exp(log_prob / count),
        math.fsum(answer.entropies) / count,
        math.fsum(answer.mutual_informations) / count,
        max(answer.mutual_informations, default=0.0),
        tuple(math.exp(math.fsum(own)) for own in zip(*answer.member_log_probs, strict=True)),
    )


def entropy(log_prob_NV: Tensor) -> Tensor:
    """-sum_v p log p over the last axis, nats; a probability of 0 adds nothing."""
    return torch.special.entr(log_prob_NV.exp()).sum(-1)


def predictions(
    log_prob_KNV: Tensor, weight_K: Tensor, target_N: Tensor, temperatures: Sequence[float]
) -> list[Predictions]:
    """What the mixture predicts at each of the temperatures.

    Args:
        log_prob_KNV: normalised over the last axis.
        weight_K: fp32, summing to 1.
        target_N: the outcomes.
        temperatures: of the pooled distribution, above 0.
    """
    p_NV = log_prob_KNV[0] if len(log_prob_KNV) == 1 else mixture_log_prob(log_prob_KNV, weight_K)
    entropy_N, information_N = entropy(p_NV), torch.zeros_like(p_NV[:, 0])
    if len(log_prob_KNV) > 1:
        own_KN = torch.stack([entropy(log_prob_NV) for log_prob_NV in log_prob_KNV])
        information_N = (entropy_N - weight_K @ own_KN).clamp(min=0)
    found = []
    for temperature in temperatures:
        q_NV = p_NV if temperature == 1 else (p_NV / temperature).log_softmax(-1)
        log_prob_N = q_NV.gather(1, target_N[:, None])[:, 0]
        top_N = q_NV.max(-1)
        brier_N = (2 * q_NV).exp().sum(-1) - 2 * log_prob_N.exp() + 1
        total_N = entropy_N if temperature == 1 else entropy(q_NV)
        is_top_N = top_N.indices == target_N
        found.append(Predictions(log_prob_N, total_N, information_N, top_N.values, is_top_N, brier_N))
    return found


def pairwise_disagreement(answer_KN: Sequence[Sequence[object]]) -> float:
    """The share of pairs of members and problems in which the
    two answer differently; 0 of a single member."""
    K, N = len(answer_KN), len(answer_KN[0])
    pairs = [(a, b) for a in range(K) for b in range(a)]
    different = sum(answer_KN[a][n] != answer_KN[b][n] for a, b in pairs for n in range(N))
    return different / (len(pairs) * N) if pairs and N else 0.0


def disagreement(answer: object, members: Sequence[object]) -> float:
    """The fraction of the members whose own answer differs from this one."""
    return sum(own != answer for own in members) / len(members)
