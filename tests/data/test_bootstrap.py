"""Bootstrap weights: their distribution, and of what they are a function."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from chorus.data.bootstrap import Bootstrap, bootstrap_weights
from chorus.errors import InputError

EVERY_KIND = pytest.mark.parametrize("kind", ["poisson", "bayesian"])
N = 20_000
ALIKE_N = torch.full((N,), 3)
UNLIKE_N = torch.arange(N) % 17 + 1


def raw(weight_N: Tensor) -> Tensor:
    """Poisson weights before they are divided by their mean: whole numbers, 1 the smallest above 0."""
    return weight_N.double() / weight_N[weight_N > 0].min().double()


def test_poisson_weights_are_poisson_counts_of_mean_and_variance_1():
    counts = raw(bootstrap_weights("poisson", 3, [5], ALIKE_N)[0])
    assert torch.allclose(counts, counts.round(), atol=1e-5)
    assert counts.mean().item() == pytest.approx(1, abs=4 / N**0.5)
    assert counts.var().item() == pytest.approx(1, abs=4 * (3 / N) ** 0.5)  # four standard errors
    found = torch.bincount(counts.round().long().clamp(max=5), minlength=6).numpy()
    expected = N * stats.poisson(1).pmf(range(5))
    assert stats.chisquare(found, [*expected, N - expected.sum()]).pvalue > 1e-3


def test_bayesian_weights_are_exponential_of_mean_and_variance_1_and_leave_no_row_out():
    weight_N = bootstrap_weights("bayesian", 3, [5], ALIKE_N)[0].double()
    assert weight_N.mean().item() == pytest.approx(1, abs=1e-6)
    assert weight_N.var().item() == pytest.approx(1, abs=4 * (8 / N) ** 0.5)  # four standard errors
    assert float(weight_N.min()) > 0
    assert stats.kstest(weight_N.numpy(), stats.expon.cdf).pvalue > 1e-3


@EVERY_KIND
def test_an_agents_weights_have_mean_1_over_the_target_tokens(kind: Bootstrap):
    for weight_N in bootstrap_weights(kind, 3, [0, 1, 2], UNLIKE_N).double():
        assert float((weight_N * UNLIKE_N).sum() / UNLIKE_N.sum()) == pytest.approx(1, abs=1e-6)


@EVERY_KIND
def test_weights_are_a_function_of_seed_agent_and_row(kind: Bootstrap):
    weight_KN = bootstrap_weights(kind, 3, [0, 1, 7], UNLIKE_N)
    alone_N = bootstrap_weights(kind, 3, [7], UNLIKE_N)[0]  # on a process that holds no other agent
    assert torch.equal(alone_N, weight_KN[2])
    fewer_N = bootstrap_weights(kind, 3, [7], UNLIKE_N[:500])[0]
    assert torch.allclose(fewer_N / fewer_N.max(), weight_KN[2, :500] / weight_KN[2, :500].max())
    others_N = torch.stack([*weight_KN, bootstrap_weights(kind, 4, [7], UNLIKE_N)[0]])
    unlike = torch.corrcoef(others_N) - torch.eye(4)
    assert float(unlike.abs().max()) < 4 / N**0.5


def test_an_agent_without_any_row_is_refused_with_the_remedy():
    """Of one row, Poisson counts leave out 37 % of the agents."""
    with pytest.raises(
        InputError, match=r"key 'bootstrap': poisson leaves agent \d+ none of the 1 training rows"
    ):
        bootstrap_weights("poisson", 0, range(64), torch.tensor([9]))
    assert bool((bootstrap_weights("bayesian", 0, range(64), torch.tensor([9])) == 1).all())
