"""Many agents, one answer: a mixture of their probabilities, computed in log space."""

import torch
from torch import Tensor


def mixture_log_prob(log_prob_K: Tensor, weight_K: Tensor) -> Tensor:
    """log Σ_k w_k p_k along the first axis, without leaving log space, where a small p_k would underflow.

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
    """Mixture weights fitted to held-out tokens under a symmetric Dirichlet prior of alpha pseudo-counts an agent.

    The fixed point of w_k = (alpha + Σ_n r_kn) / (K·alpha + N), where r_kn is the probability that token n came from
    agent k: expectation-maximisation for the weights of a mixture (Dempster et al. 1977), to the mode of the posterior
    under Dirichlet(alpha + 1, ..., alpha + 1). It is concave in the weights, so the start does not matter.

    Args:
        log_prob_KN: log-probabilities of N held-out tokens.
        alpha: > 0. Small alphas let the tokens decide, large ones stay near the plain mean.

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
