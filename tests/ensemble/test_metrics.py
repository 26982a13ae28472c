"""Scores against torchmetrics, scikit-learn, closed forms and float64."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import auc, roc_auc_score, roc_curve
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from chorus.ensemble.metrics import (
    adaptive_calibration_error,
    auroc,
    calibration_error,
    error_detection,
    fpr_at_95,
    paired_bootstrap,
    risk_at_coverage,
)


def drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Confidences, some of them equal, and whether each was right: more often where it is high."""
    generator = torch.Generator().manual_seed(seed)
    confidence_N = (torch.rand(count, generator=generator) * 40).round() / 40
    return confidence_N, torch.rand(count, generator=generator) < 0.3 + 0.5 * confidence_N


@pytest.mark.parametrize("count", [1, 7, 500])
def test_the_calibration_error_is_that_of_torchmetrics(count: int):
    confidence_N, is_right_N = drawn(count)
    confidence_N = confidence_N * 0.99 + 0.003  # off the edges of bins, where the two round differently
    expected = binary_calibration_error(confidence_N, is_right_N.long(), n_bins=15, norm="l1")
    assert calibration_error(confidence_N, is_right_N) == pytest.approx(float(expected), abs=1e-6)


def test_the_adaptive_calibration_error_has_bins_of_equal_counts():
    confidence_N = torch.linspace(0, 1, 30)
    is_right_N = torch.arange(30) % 2 == 0
    pairs = zip(confidence_N.view(15, 2).double(), is_right_N.view(15, 2).double(), strict=True)
    expected = sum(abs(float((p - right).sum())) for p, right in pairs) / 30
    assert adaptive_calibration_error(confidence_N.flip(0), is_right_N.flip(0)) == pytest.approx(
        expected, abs=1e-7
    )
    assert adaptive_calibration_error(torch.tensor([0.25]), torch.tensor([True])) == pytest.approx(0.75)


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
def test_the_auroc_is_that_of_scikit_learn(scale: float):
    score_N, is_positive_N = drawn(300)
    score_N = (score_N - 0.5) * scale
    assert auroc(score_N, is_positive_N) == pytest.approx(
        roc_auc_score(is_positive_N.numpy(), score_N.numpy())
    )


def test_the_false_positive_rate_is_read_off_the_curve_of_scikit_learn():
    score_N, is_positive_N = drawn(300)
    false_M, true_M, _ = roc_curve(is_positive_N.numpy(), score_N.numpy(), drop_intermediate=False)
    assert fpr_at_95(score_N, is_positive_N) == pytest.approx(float(false_M[np.argmax(true_M >= 0.95)]))


@pytest.mark.parametrize("is_positive", [True, False])
def test_without_one_of_the_two_kinds_detection_is_not_defined(is_positive: bool):
    score_N, is_positive_N = torch.rand(5), torch.full((5,), is_positive)
    assert math.isnan(auroc(score_N, is_positive_N))
    assert math.isnan(fpr_at_95(score_N, is_positive_N))
    assert math.isnan(error_detection(score_N, is_positive_N)["PRR"])
    assert math.isnan(calibration_error(score_N[:0], is_positive_N[:0]))


def test_risk_counts_errors_among_the_least_uncertain():
    risk_N = risk_at_coverage(torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([False, True, False, True]))
    assert risk_N.tolist() == pytest.approx([0, 0, 1 / 3, 2 / 4])


def test_equal_uncertainties_make_a_risk_that_does_not_depend_on_the_order():
    is_wrong_N = torch.tensor([True, False, False, True, False])
    for order in ([0, 1, 2, 3, 4], [4, 2, 1, 3, 0]):
        assert risk_at_coverage(torch.zeros(5), is_wrong_N[order]).tolist() == pytest.approx([0.4] * 5)


def test_error_detection_of_a_perfect_and_of_the_worst_order():
    is_wrong_N = torch.arange(10) >= 6
    perfect = error_detection(is_wrong_N.double() + torch.arange(10) / 100, is_wrong_N)
    # coverages of 7 to 10 of 10 hold 1 to 4 errors
    assert perfect["AURC"] == pytest.approx((1 / 7 + 2 / 8 + 3 / 9 + 4 / 10) / 10)
    assert (perfect["AUROC"], perfect["PRR"], perfect["Risk@80Cov"]) == pytest.approx((1.0, 1.0, 2 / 8))
    worst = error_detection(-is_wrong_N.double() - torch.arange(10) / 100, is_wrong_N)
    assert worst["AUROC"] == 0
    assert worst["PRR"] < -0.5


def test_the_area_is_that_under_the_curve_of_risks():
    uncertainty_N, is_right_N = drawn(200)
    uncertainty_N = (
        uncertainty_N + torch.rand(200, generator=torch.Generator().manual_seed(1)) / 1000
    )  # no ties
    order = uncertainty_N.argsort()
    risks = [float((~is_right_N)[order[:n]].double().mean()) for n in range(1, 201)]
    found = error_detection(uncertainty_N, ~is_right_N)["AURC"]
    assert found == pytest.approx(sum(risks) / 200)
    assert found == pytest.approx(auc(np.arange(1, 201) / 200, risks), abs=0.01)


def test_the_interval_of_a_mean_has_the_width_of_the_normal_law():
    value_N = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.8).double()
    low, high = paired_bootstrap({"one": (value_N, torch.ones(400))}, seed=0)["one"]
    assert low < float(value_N.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 * float(value_N.std()) / 20, rel=0.1)


def test_what_is_common_to_two_answerers_does_not_widen_their_difference():
    generator = torch.Generator().manual_seed(0)
    hard_N = torch.rand(200, generator=generator).double()
    sums = {"one": (hard_N, torch.ones(200)), "other": (hard_N + 0.05, torch.ones(200))}
    low, high = paired_bootstrap(sums, seed=0, against="one")["other"]
    assert (low, high) == pytest.approx((0.05, 0.05))
    alone = paired_bootstrap(sums, seed=0)["other"]
    assert alone.high - alone.low > 0.05


def test_a_score_of_tokens_weighs_problems_by_their_tokens():
    sums = {"one": (torch.tensor([10.0, 1.0]), torch.tensor([100.0, 1.0]))}
    low, high = paired_bootstrap(sums, seed=0)["one"]
    assert (low, high) == pytest.approx((0.1, 1.0))
    assert paired_bootstrap({"one": (torch.empty(0), torch.empty(0))}, seed=0) == {}
