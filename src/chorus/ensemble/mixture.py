"""Mixtures of agents: weights, temperature, and how they are fitted."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chorus.errors import InputError

COLDEST, HOTTEST = 0.1, 10.0  # range of temperatures: if all predictions are right, the optimum would be 0
SUM_TOLERANCE = 1e-4  # tolerance for weights written by hand or as fp32


@dataclass(frozen=True)
class Mixture:
    """A linear opinion pool: q(v) is proportional to (sum_k w_k p_k(v))^(1/T).

    Attributes:
        weights: w, one for each member, summing to 1.
        temperature: T, after pooling.
    """

    weights: tuple[float, ...]
    temperature: float = 1.0

    @classmethod
    def uniform(cls, num_members: int) -> "Mixture":
        """The plain mean of the members' probabilities."""
        return cls((1 / num_members,) * num_members)

    def log_prob(self, log_prob_KNV: Tensor) -> Tensor:
        """log q_NV of N distributions over V outcomes, from the members' log-probabilities."""
        log_prob_NV = mixture_log_prob(log_prob_KNV, torch.tensor(self.weights, device=log_prob_KNV.device))
        return log_prob_NV if self.temperature == 1 else (log_prob_NV / self.temperature).log_softmax(-1)

    def to_json(self) -> dict[str, Any]:
        """Its entries of `ensemble.json`."""
        return {"weights": list(self.weights), "temperature": self.temperature}

    @classmethod
    def from_json(cls, entries: Mapping[str, Any], num_members: int, place: str) -> "Mixture":
        """A mixture from the entries of `ensemble.json`, in which an older file has no temperature.

        Raises:
            InputError: not one finite weight a member, weights that do not sum to 1, or a temperature that is
                not above 0. It names `place`.
        """
        given, temperature = entries.get("weights"), entries.get("temperature", 1.0)
        weights = given if isinstance(given, list) and all(map(_is_finite, given)) else []
        if (
            len(weights) != num_members
            or min(weights, default=-1) < 0
            or abs(sum(weights) - 1) > SUM_TOLERANCE
        ):
            raise InputError(
                f"{place}: weights {given} of {num_members} agents; give one number from 0 to 1 an agent, "
                "1 together"
            )
        if not _is_finite(temperature) or temperature <= 0:
            raise InputError(f"{place}: temperature {temperature}; give a number above 0")
        return cls(tuple(map(float, weights)), float(temperature))


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mixture_log_prob(log_prob_K: Tensor, weight_K: Tensor) -> Tensor:
    """log sum_k w_k p_k along the first axis, without leaving log space, where a small p_k would underflow.

    Args:
        log_prob_K: shape (K, ...), log-probabilities of the agents.
        weight_K: shape (K,), the mixture's weights, summing to 1.
    """
    log_weight = weight_K.log().view(-1, *[1] * (log_prob_K.ndim - 1))
    return (log_prob_K + log_weight).logsumexp(0)


def uniform_weights(num_agents: int) -> Tensor:
    """The plain mean of the agents' probabilities."""
    return torch.full((num_agents,), 1 / num_agents)


def dirichlet_weights(log_prob_KN: Tensor, alpha: float, tolerance: float = 1e-7) -> Tensor:
    """Mixture weights fitted to N observations under a symmetric Dirichlet prior of alpha pseudo-counts an
    agent.

    The fixed point of w_k = (alpha + sum_n r_kn) / (K alpha + N), where r_kn is the probability that
    observation n came from agent k: expectation-maximisation for the weights of a mixture (Dempster et al.
    1977), to the mode of the posterior under Dirichlet(alpha + 1, ..., alpha + 1). It is concave in the
    weights, so the start does not matter.

    An observation is a token, or a whole answer with the sum of its tokens' log-probabilities. The tokens of
    an answer are not independent, so a fit to tokens is overconfident in its weights.

    Args:
        log_prob_KN: log-probabilities of the observations.
        alpha: > 0. Small alphas let the data decide, large ones stay near the plain mean.

    Returns:
        weight_K, float64 inside, fp32 out; the plain mean for N = 0.
    """
    K, N = log_prob_KN.shape
    log_prob_KN = log_prob_KN.double()
    weight_K = torch.full((K,), 1 / K, dtype=torch.float64, device=log_prob_KN.device)
    for _ in range(10_000):
        responsibility_KN = (log_prob_KN + weight_K.log()[:, None]).softmax(0)
        update_K = (alpha + responsibility_KN.sum(1)) / (K * alpha + N)
        converged = bool((update_K - weight_K).abs().max() < tolerance)
        weight_K = update_K
        if converged:
            break
    return weight_K.float()


def temperature_slope(log_prob_NV: Tensor, target_N: Tensor, beta: float) -> tuple[float, float]:
    """First and second derivative of the summed NLL at inverse temperature beta.

    NLL(beta) = -beta l_target + log sum_v exp(beta l_v), whose derivative is E_q[l] - l_target, and then
    Var_q[l].
    """
    q_NV = (beta * log_prob_NV).softmax(-1)
    finite_NV = log_prob_NV.clamp(min=torch.finfo(log_prob_NV.dtype).min)  # 0 x -inf is not finite
    mean_N = (q_NV * finite_NV).sum(-1)
    variance_N = (q_NV * (finite_NV - mean_N[:, None]).square()).sum(-1)
    target_log_prob_N = log_prob_NV.gather(1, target_N[:, None])[:, 0]
    return float((mean_N - target_log_prob_N).double().sum()), float(variance_N.double().sum())


def fit_temperatures(slopes: Callable[[list[float]], list[tuple[float, float]]], count: int) -> list[float]:
    """The temperatures that minimise the NLL (Guo et al. 2017), from 0.1 to 10, for several predictors at
    once.

    The NLL is convex in 1 / temperature: Newton's method, with bisection bounds around the sign change of the
    slope.

    Args:
        slopes: `temperature_slope` of every predictor at its inverse temperature.
        count: of predictors.
    """
    low, high, betas = [1 / HOTTEST] * count, [1 / COLDEST] * count, [1.0] * count
    for _ in range(30):
        before = betas
        betas = []
        for index, (slope, curvature) in enumerate(slopes(before)):
            beta = before[index]
            if slope > 0:
                high[index] = beta
            else:
                low[index] = beta
            step = beta - slope / curvature if curvature > 0 else math.nan
            is_inside = low[index] < step < high[index]
            betas.append(step if is_inside else (low[index] * high[index]) ** 0.5)
        if all(abs(new - old) <= 1e-5 * old for new, old in zip(betas, before, strict=True)):
            break
    return [1 / beta for beta in betas]
