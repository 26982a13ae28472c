import itertools
import json

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from chorus.ensemble.mixture import (
    Mixture,
    dirichlet_weights,
    fit_temperatures,
    mixture_log_prob,
    temperature_slope,
    uniform_weights,
)
from chorus.errors import InputError


def random_log_probs(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Log-probabilities over the last axis."""
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator)).log_softmax(-1)


def most_probable_weights(log_prob_KN: Tensor, alpha: float) -> np.ndarray:
    """argmax over the simplex of sum_n log sum_k w_k p_kn +
    alpha sum_k log w_k, by a general-purpose optimiser."""
    probability_KN = log_prob_KN.double().exp().numpy()

    def loss(weight_K: np.ndarray) -> float:
        return -np.log(weight_K @ probability_KN).sum() - alpha * np.log(weight_K).sum()

    def slope(weight_K: np.ndarray) -> np.ndarray:
        return -(probability_KN / (weight_K @ probability_KN)).sum(1) - alpha / weight_K

    K = len(probability_KN)
    found = minimize(
        loss,
        np.full(K, 1 / K),
        jac=slope,
        method="SLSQP",
        bounds=[(1e-9, 1.0)] * K,
        constraints={"type": "eq", "fun": lambda weight_K: weight_K.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.success, found.message
    return found.x


# ---- the mixture ----


def test_the_mixture_is_the_weighted_sum_of_probabilities():
    log_prob = random_log_probs(3, 4, 5, 11)
    weight_K = torch.tensor([0.5, 0.2, 0.3])
    expected = torch.einsum("k,kbtv->btv", weight_K.double(), log_prob.double().exp()).log()
    torch.testing.assert_close(mixture_log_prob(log_prob, weight_K).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_mixture_of_distributions_is_a_distribution():
    total = (
        mixture_log_prob(random_log_probs(4, 6, 50, spread=8), torch.tensor([0.1, 0.2, 0.3, 0.4]))
        .exp()
        .sum(-1)
    )
    torch.testing.assert_close(total, torch.ones(6), rtol=1e-6, atol=1e-6)


def test_log_probabilities_far_below_underflow_keep_their_digits():
    log_prob_KN = torch.tensor([[-10_000.0, -3.0], [-10_001.0, -20_000.0]])
    mixed = mixture_log_prob(log_prob_KN, torch.tensor([0.25, 0.75])).double()
    far = -10_000 + np.log(0.25 + 0.75 * np.exp(-1))
    torch.testing.assert_close(mixed, torch.tensor([far, np.log(0.25) - 3]).double(), rtol=2e-7, atol=0)


def test_an_agent_of_weight_one_is_the_mixture_and_one_of_weight_zero_does_not_count():
    log_prob = random_log_probs(3, 7)
    log_prob[1, 2] = -torch.inf
    torch.testing.assert_close(mixture_log_prob(log_prob, torch.tensor([1.0, 0.0, 0.0])), log_prob[0])


@pytest.mark.parametrize("num_agents", [1, 3, 7])
def test_the_plain_mean_is_the_mean_of_probabilities(num_agents: int):
    log_prob = random_log_probs(num_agents, 9)
    expected = log_prob.double().exp().mean(0).log()
    mixed = mixture_log_prob(log_prob, uniform_weights(num_agents))
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-6, atol=1e-6)


# ---- weights fitted under a Dirichlet prior ----


@pytest.mark.parametrize("alpha", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("num_tokens", [1, 5, 300])
def test_the_weights_are_the_most_probable_ones(alpha: float, num_tokens: int):
    log_prob_KN = random_log_probs(num_tokens, 8)[:, :4].T - torch.tensor([[0.0], [0.3], [0.6], [0.9]])
    weight_K = dirichlet_weights(log_prob_KN, alpha)
    assert weight_K.dtype == torch.float32
    assert weight_K.double().sum().item() == pytest.approx(1, abs=1e-6)
    assert weight_K.numpy() == pytest.approx(most_probable_weights(log_prob_KN, alpha), abs=2e-5)


def test_the_more_an_agent_explains_the_more_weight_it_gets():
    log_prob_KN = torch.tensor([[-0.1], [-2.0], [-4.0]]).expand(3, 1000)
    first, second, third = dirichlet_weights(log_prob_KN, 0.5).tolist()
    assert first > 0.99
    assert first > second > third > 0


def test_a_large_alpha_is_the_plain_mean_and_a_small_one_is_not():
    log_prob_KN = torch.tensor([[-0.1], [-2.0], [-4.0]]).expand(3, 100)
    torch.testing.assert_close(dirichlet_weights(log_prob_KN, 1e7), uniform_weights(3), rtol=0, atol=1e-4)
    assert dirichlet_weights(log_prob_KN, 0.1).max() > 0.98


def test_no_token_or_equal_agents_give_the_plain_mean():
    torch.testing.assert_close(dirichlet_weights(torch.empty(5, 0), 0.3), uniform_weights(5))
    same_KN = random_log_probs(1, 40).expand(4, 40)
    torch.testing.assert_close(dirichlet_weights(same_KN, 0.3), uniform_weights(4))


def test_agents_in_another_order_get_the_same_weights_in_that_order():
    log_prob_KN = random_log_probs(60, 9)[:, :3].T
    weight_K = dirichlet_weights(log_prob_KN, 0.7)
    for order in itertools.permutations(range(3)):
        torch.testing.assert_close(dirichlet_weights(log_prob_KN[list(order)], 0.7), weight_K[list(order)])


def test_tokens_that_every_agent_finds_impossible_to_fp32_still_decide():
    """exp(-10 000) is 0 also in float64: only their differences matter."""
    log_prob_KN = random_log_probs(30, 6)[:, :3].T
    far = dirichlet_weights(log_prob_KN.double() - 10_000, 0.5)
    torch.testing.assert_close(far, dirichlet_weights(log_prob_KN, 0.5), rtol=0, atol=1e-6)


# ---- temperature ----


def overconfident(count: int = 400, sharpness: float = 2.5) -> tuple[Tensor, Tensor]:
    """Outcomes drawn from distributions, and the log-probabilities of a model that sharpens these."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = 2 * torch.randn(count, 7, generator=generator)
    target_N = torch.multinomial(logits_NV.softmax(-1), 1, generator=generator)[:, 0]
    return (sharpness * logits_NV).log_softmax(-1), target_N


def test_the_fitted_temperature_has_the_least_nll():
    log_prob_NV, target_N = overconfident()
    [temperature] = fit_temperatures(lambda betas: [temperature_slope(log_prob_NV, target_N, betas[0])], 1)

    def nll(temperature: float) -> float:
        return float(
            torch.nn.functional.nll_loss((log_prob_NV.double() / temperature).log_softmax(-1), target_N)
        )

    assert temperature == pytest.approx(2.5, rel=0.15)  # what has been sharpened is undone
    assert nll(temperature) <= min(nll(temperature * 1.01), nll(temperature / 1.01))


def test_predictors_are_fitted_apart_from_each_other():
    made = [overconfident(sharpness=sharpness) for sharpness in (0.3, 1.0, 4.0)]
    alone = [
        fit_temperatures(lambda betas, one=one: [temperature_slope(*one, betas[0])], 1)[0] for one in made
    ]
    together = fit_temperatures(
        lambda betas: [temperature_slope(*o, b) for o, b in zip(made, betas, strict=True)], 3
    )
    assert together == pytest.approx(alone, rel=1e-4)
    assert sorted(together) == together


def test_predictions_that_are_all_right_or_all_wrong_end_at_the_bounds():
    log_prob_NV = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).log_softmax(-1)
    for target_N, expected in ((torch.tensor([0, 1]), 0.1), (torch.tensor([1, 0]), 10.0)):
        [found] = fit_temperatures(lambda betas, t=target_N: [temperature_slope(log_prob_NV, t, betas[0])], 1)
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_mixture_is_pooled_before_its_temperature():
    log_prob_KNV = random_log_probs(3, 4, 9, spread=3)
    found = Mixture((0.5, 0.3, 0.2), temperature=2.0).log_prob(log_prob_KNV).double().exp()
    p_NV = (torch.tensor([0.5, 0.3, 0.2]).double()[:, None, None] * log_prob_KNV.double().exp()).sum(0)
    expected = p_NV.sqrt() / p_NV.sqrt().sum(-1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# ---- JSON ----


def test_a_mixture_comes_back_from_json():
    mixture = Mixture((0.25, 0.75), 1.5)
    assert Mixture.from_json(json.loads(json.dumps(mixture.to_json())), 2, "file") == mixture
    assert Mixture.from_json({"weights": [0.25, 0.75]}, 2, "file").temperature == 1


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"weights": [0.5]},
        {"weights": [0.5, 0.6]},
        {"weights": [1.5, -0.5]},
        {"weights": [0.5, "0.5"]},
        {"weights": [True, False]},
        {"weights": [float("nan"), 0.5]},
        {"weights": [float("inf"), 0.5]},
        {"weights": [0.5, 0.5], "temperature": 0},
        {"weights": [0.5, 0.5], "temperature": float("nan")},
        {"weights": [0.5, 0.5], "temperature": None},
    ],
)
def test_what_is_no_mixture_is_refused_in_a_line_that_names_the_file(entries: dict):
    with pytest.raises(InputError, match=r"^runs/one/ensemble.json: [^\n]*; give ") as error:
        Mixture.from_json(entries, 2, "runs/one/ensemble.json")
    assert "\n" not in str(error.value)
