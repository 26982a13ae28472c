"""Scores of probabilities and of uncertainties. Names in reports are those of torch-uncertainty, where it has
them.

Every function takes plain tensors with one number for each problem (or token) and returns a float; `nan`
where a score is not defined, such as error detection without an error. The tests compare them with
torchmetrics and scikit-learn. A run does not use these: importing torchmetrics takes as long as a fifth of
the default run's evaluation.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.seeding import derive_seed

NUM_BINS = 15
NUM_RESAMPLES = 1_000


def calibration_error(confidence_N: Tensor, is_right_N: Tensor) -> float:
    """Expected calibration error over 15 bins of equal width (Naeini et al. 2015)."""
    if not len(confidence_N):
        return math.nan
    bin_N = (confidence_N * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    gap_M = torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(
        0, bin_N, confidence_N.double() - is_right_N.double()
    )
    return float(gap_M.abs().sum()) / len(confidence_N)


def adaptive_calibration_error(confidence_N: Tensor, is_right_N: Tensor) -> float:
    """As `calibration_error`, over 15 bins with equally many predictions (Nixon et al. 2019)."""
    if not len(confidence_N):
        return math.nan
    order_N = confidence_N.argsort(stable=True)
    gaps = [
        abs(float((confidence_N[bin_M].double() - is_right_N[bin_M].double()).sum()))
        for bin_M in order_N.tensor_split(min(NUM_BINS, len(order_N)))
    ]
    return sum(gaps) / len(order_N)


def auroc(score_N: Tensor, is_positive_N: Tensor) -> float:
    """The probability that a positive has a higher score than a
    negative; ties count half (Hanley and McNeil 1982)."""
    num_positive = int(is_positive_N.sum())
    num_negative = len(is_positive_N) - num_positive
    if not num_positive or not num_negative:
        return math.nan
    _, tie_N, count_M = score_N.unique(return_inverse=True, return_counts=True)
    rank_M = count_M.cumsum(0).double() - (count_M.double() - 1) / 2  # ranks from 1; ties get their mean rank
    of_positives = float(rank_M[tie_N][is_positive_N].sum())
    return (of_positives - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def fpr_at_95(score_N: Tensor, is_positive_N: Tensor) -> float:
    """The false positive rate at the threshold with a true positive rate of 95 %."""
    if bool(is_positive_N.all()) or not bool(is_positive_N.any()):
        return math.nan
    positive_P = score_N[is_positive_N].sort(descending=True).values
    threshold = positive_P[math.ceil(0.95 * len(positive_P)) - 1]
    return float((score_N[~is_positive_N] >= threshold).double().mean())


def risk_at_coverage(uncertainty_N: Tensor, is_wrong_N: Tensor) -> Tensor:
    """risk_N[n - 1]: the share of errors among the n least uncertain answers.

    Ties have no order: each counts as the mean over all of them.
    """
    order_N = uncertainty_N.argsort(stable=True)
    _, tie_N = uncertainty_N[order_N].unique_consecutive(return_inverse=True)
    errors_M = torch.zeros(int(tie_N[-1]) + 1, dtype=torch.float64).index_add_(
        0, tie_N, is_wrong_N[order_N].double()
    )
    mean_N = (errors_M / tie_N.bincount())[tie_N]
    return mean_N.cumsum(0) / torch.arange(1, len(order_N) + 1)


def error_detection(uncertainty_N: Tensor, is_wrong_N: Tensor) -> dict[str, float]:
    """How well an uncertainty tells wrong answers from right ones.

    AUROC: see `auroc`. AURC: the mean risk over all coverages (Geifman et al. 2019), lower is better.
    Risk@80Cov: the share of errors among the 80 % least uncertain. PRR: the prediction rejection ratio
    (Malinin et al. 2021): how much of the AURC's distance from random to a perfect order is gained; 1 is
    perfect, 0 random.
    """
    if not len(uncertainty_N):
        return dict.fromkeys(("AUROC", "AURC", "Risk@80Cov", "PRR"), math.nan)
    risk_N = risk_at_coverage(uncertainty_N, is_wrong_N)
    aurc = float(risk_N.mean())
    best = float(risk_at_coverage(is_wrong_N.double(), is_wrong_N).mean())
    random = float(is_wrong_N.double().mean())
    return {
        "AUROC": auroc(uncertainty_N, is_wrong_N),
        "AURC": aurc,
        "Risk@80Cov": float(risk_N[math.ceil(0.8 * len(risk_N)) - 1]),
        "PRR": (random - aurc) / (random - best) if random > best else math.nan,
    }


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def paired_bootstrap(
    sums: Mapping[str, tuple[Tensor, Tensor]], seed: int, against: str | None = None
) -> dict[str, Interval]:
    """95 % percentile intervals of means, or of their differences to that of `against` (Efron 1979).

    Problems are drawn with replacement, the same ones for every answerer, so that the difficulty that
    answerers share does not widen the interval of a difference.

    Args:
        sums: by answerer, each problem's summed values and their count: the score is a ratio of sums.
        seed: of the draws.
        against: an answerer in `sums`.
    """
    N = len(next(iter(sums.values()))[0]) if sums else 0
    if N == 0:
        return {}
    generator = torch.Generator().manual_seed(derive_seed(seed, "bootstrap"))
    drawn_RN = torch.randint(N, (NUM_RESAMPLES, N), generator=generator)
    count_RN = torch.zeros(NUM_RESAMPLES, N, dtype=torch.float64).scatter_add_(
        1, drawn_RN, torch.ones(NUM_RESAMPLES, N, dtype=torch.float64)
    )
    means = {
        name: (count_RN @ value_N.double()) / (count_RN @ of_N.double())
        for name, (value_N, of_N) in sums.items()
    }
    if against is not None:
        means = {name: mean_R - means[against] for name, mean_R in means.items()}
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: Interval(*mean_R.quantile(bounds).tolist()) for name, mean_R in means.items()}
