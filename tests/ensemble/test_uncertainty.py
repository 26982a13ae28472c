"""Each quantity against its definition in float64."""

import math

import pytest
import torch
from torch import Tensor

from chorus.ensemble.uncertainty import disagreement, entropy, pairwise_disagreement, predictions

K, N, V = 3, 5, 11


def members() -> Tensor:
    logits = 4 * torch.randn(K, N, V, generator=torch.Generator().manual_seed(0))
    return logits.log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
def test_predictions_are_those_of_the_mixture_written_out(temperature: float):
    log_prob_KNV, weight_K, target_N = members(), torch.tensor([0.5, 0.2, 0.3]), torch.arange(N)
    [found] = predictions(log_prob_KNV, weight_K, target_N, [temperature])
    p_NV = (weight_K.double()[:, None, None] * log_prob_KNV.double().exp()).sum(0)
    q_NV = p_NV ** (1 / temperature) / (p_NV ** (1 / temperature)).sum(-1, keepdim=True)
    is_target_NV = torch.nn.functional.one_hot(target_N, V).double()
    own_KN = -(log_prob_KNV.double().exp() * log_prob_KNV.double()).sum(-1)
    information_N = -(p_NV * p_NV.log()).sum(-1) - weight_K.double() @ own_KN
    expected = {
        "log_prob_N": q_NV[torch.arange(N), target_N].log(),
        "entropy_N": -(q_NV * q_NV.log()).sum(-1),
        "mutual_information_N": information_N,
        "max_log_prob_N": q_NV.max(-1).values.log(),
        "brier_N": (q_NV - is_target_NV).square().sum(-1),
    }
    for name, value_N in expected.items():
        torch.testing.assert_close(getattr(found, name).double(), value_N, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.is_top_N, q_NV.argmax(-1) == target_N)


def test_a_single_member_has_no_one_to_disagree_with():
    log_prob_KNV = members()[:1]
    [found] = predictions(log_prob_KNV, torch.ones(1), torch.zeros(N, dtype=torch.int64), [1.0])
    assert found.mutual_information_N.tolist() == [0] * N
    torch.testing.assert_close(found.log_prob_N, log_prob_KNV[0, :, 0])


def test_members_that_are_certain_of_different_outcomes_carry_all_the_information():
    log_prob_KNV = torch.full((2, 1, 2), -math.inf)
    log_prob_KNV[0, 0, 0] = log_prob_KNV[1, 0, 1] = 0
    [found] = predictions(log_prob_KNV, torch.tensor([0.5, 0.5]), torch.tensor([0]), [1.0])
    assert float(found.mutual_information_N) == pytest.approx(math.log(2))
    assert float(found.entropy_N) == pytest.approx(math.log(2))
    assert float(found.brier_N) == pytest.approx(0.5)


def test_a_uniform_distribution_has_the_entropy_of_its_size():
    assert float(entropy(torch.full((1, 8), -math.log(8)))) == pytest.approx(math.log(8))


def test_disagreement_counts_answers():
    assert disagreement("4", ["4", "5", "5", "4"]) == 0.5
    assert pairwise_disagreement([["1", "2"], ["1", "3"], ["1", "4"]]) == pytest.approx(3 / 6)
    assert pairwise_disagreement([["1", "2"]]) == 0
