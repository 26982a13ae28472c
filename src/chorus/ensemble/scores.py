"""Scores of answerers from their outcomes on every problem.

    cls/Acc                 share of exact matches, or of right choices
    cls/NLL, cls/Brier      of a whole reference answer, nats; cls/Brier for choices only
    token/...               of the reference's tokens, in texts: NLL (nats), perplexity, Acc, Brier, ECE, aECE
    cal/ECE, cal/aECE       calibration of the answer's probability against its being right
    sc/METRIC/UNCERTAINTY   telling wrong answers from right ones: AUROC, AURC, Risk@80Cov, PRR
    ood/METRIC/UNCERTAINTY  telling the second data set's problems from these: AUROC, FPR95
    ens/...                 of a mixture: Ambiguity (mean NLL of its members less its own, nats), Disagreement
                            (share of pairs of members that answer differently), MutualInformation (nats)

UNCERTAINTY is max_p (1 less the answer's probability), entropy, and for mixtures mutual_information and
disagreement.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from chorus.ensemble.metrics import (
    Interval,
    adaptive_calibration_error,
    auroc,
    calibration_error,
    error_detection,
    fpr_at_95,
    paired_bootstrap,
)
from chorus.ensemble.outcomes import Outcome
from chorus.ensemble.uncertainty import UNCERTAINTIES, pairwise_disagreement

Scores = dict[str, float]

OF_ANSWERS = ("cls/Acc", "cls/NLL", "cls/Brier", "cal/ECE", "cal/aECE")
OF_TOKENS = tuple(f"token/{name}" for name in ("NLL", "perplexity", "Acc", "Brier", "ECE", "aECE"))
OF_UNCERTAINTY = ("sc/AUROC", "sc/AURC", "sc/Risk@80Cov", "sc/PRR", "ood/AUROC", "ood/FPR95")
OF_MIXTURES = ("ens/Ambiguity", "ens/Disagreement", "ens/MutualInformation")

# Scores that are means over problems or tokens, for which intervals are computed: a problem's summed values
# and counts.
MEANS: dict[str, Callable[[Outcome], tuple[float, float]]] = {
    "cls/Acc": lambda one: (float(one.is_right), 1),
    "cls/NLL": lambda one: (-float(one.log_prob_T.double().sum()), 1),
    "token/NLL": lambda one: (-float(one.log_prob_T.double().sum()), len(one.log_prob_T)),
    "token/Brier": lambda one: (float(one.brier_T.double().sum()), len(one.brier_T)),
}


LOWER_IS_BETTER = {"NLL", "perplexity", "Brier", "ECE", "aECE", "AURC", "Risk@80Cov", "FPR95"}


def is_lower_better(name: str) -> bool:
    """Whether a smaller value of a score, such as `uniform/token/NLL`, is the better one."""
    return not LOWER_IS_BETTER.isdisjoint(name.split("/"))


def uncertainty(outcome: Outcome, name: str) -> float:
    """The uncertainty of an answer by one of `UNCERTAINTIES`."""
    return 1 - outcome.probability if name == "max_p" else float(getattr(outcome, name))


def score_names(is_mixture: bool) -> list[str]:
    """All scores that an answerer may have; which ones it has
    depends on the task and on a second data set."""
    told = [f"{score}/{name}" for score in OF_UNCERTAINTY for name in uncertainties(is_mixture)]
    return [*OF_ANSWERS, *OF_TOKENS, *told, *(OF_MIXTURES if is_mixture else ())]


def uncertainties(is_mixture: bool) -> Sequence[str]:
    """The uncertainties that are defined: a single member has no disagreement."""
    return UNCERTAINTIES if is_mixture else UNCERTAINTIES[:2]


def scores_of(
    outcomes: Sequence[Outcome], ood: Sequence[Outcome], *, is_choice: bool, is_mixture: bool
) -> Scores:
    """The scores of one answerer at one temperature; `nan` where one is not defined."""
    if not outcomes:
        return {}
    is_right_N = torch.tensor([one.is_right for one in outcomes])
    probability_N = torch.tensor([one.probability for one in outcomes], dtype=torch.float64)
    scores = {
        "cls/Acc": float(is_right_N.double().mean()),
        "cls/NLL": _mean("cls/NLL", outcomes),
        **(_choice_scores(outcomes) if is_choice else _token_scores(outcomes)),
        "cal/ECE": calibration_error(probability_N, is_right_N),
        "cal/aECE": adaptive_calibration_error(probability_N, is_right_N),
    }
    for name in uncertainties(is_mixture):
        own_N, other_N = (_values(some, name) for some in (outcomes, ood))
        scores |= {
            f"sc/{metric}/{name}": value for metric, value in error_detection(own_N, ~is_right_N).items()
        }
        if len(ood):
            both_N, is_ood_N = (
                torch.cat([own_N, other_N]),
                torch.arange(len(own_N) + len(other_N)) >= len(own_N),
            )
            scores |= {
                f"ood/AUROC/{name}": auroc(both_N, is_ood_N),
                f"ood/FPR95/{name}": fpr_at_95(both_N, is_ood_N),
            }
    if is_mixture:
        scores["ens/MutualInformation"] = float(_values(outcomes, "mutual_information").mean())
    return scores


def _token_scores(outcomes: Sequence[Outcome]) -> Scores:
    max_prob_N, is_top_N = (
        torch.cat([getattr(one, name) for one in outcomes]) for name in ("max_prob_T", "is_top_T")
    )
    nll = _mean("token/NLL", outcomes)
    return {
        "token/NLL": nll,
        "token/perplexity": math.exp(min(nll, 700.0)),
        "token/Acc": float(is_top_N.double().mean()),
        "token/Brier": _mean("token/Brier", outcomes),
        "token/ECE": calibration_error(max_prob_N, is_top_N),
        "token/aECE": adaptive_calibration_error(max_prob_N, is_top_N),
    }


def _choice_scores(outcomes: Sequence[Outcome]) -> Scores:
    return {"cls/Brier": float(torch.cat([one.brier_T for one in outcomes]).double().mean())}


def _mean(name: str, outcomes: Sequence[Outcome]) -> float:
    values, counts = zip(*map(MEANS[name], outcomes), strict=True)
    return sum(values) / sum(counts) if sum(counts) else math.nan


def _values(outcomes: Sequence[Outcome], name: str) -> Tensor:
    return torch.tensor([uncertainty(one, name) for one in outcomes], dtype=torch.float64)


def ensemble_scores(
    mixture: Scores,
    members: Sequence[Scores],
    weights: Sequence[float],
    answers: Sequence[Sequence[str]],
    key: str,
) -> Scores:
    """A mixture's gain over its members, and how often the members differ.

    Args:
        answers: of the members, [member][problem], as they are compared.
        key: the NLL that is meant: token/NLL or cls/NLL.
    """
    mean = sum(weight * member[key] for weight, member in zip(weights, members, strict=True))
    return {"ens/Ambiguity": mean - mixture[key], "ens/Disagreement": pairwise_disagreement(answers)}


def intervals_of(
    outcomes: Mapping[str, Sequence[Outcome]], seed: int, against: str | None, is_choice: bool
) -> dict[str, dict[str, Interval]]:
    """By answerer and score: 95 % intervals of the scores in
    `MEANS`, or of their differences to those of `against`."""
    found: dict[str, dict[str, Interval]] = {name: {} for name in outcomes}
    for score, of_problem in MEANS.items():
        if is_choice and score.startswith("token/"):
            continue
        sums = {}
        for name, own in outcomes.items():
            value_N2 = torch.tensor([of_problem(one) for one in own], dtype=torch.float64).view(-1, 2)
            sums[name] = (value_N2[:, 0], value_N2[:, 1])
        for name, interval in paired_bootstrap(sums, seed, against).items():
            found[name][score] = interval
    return found
