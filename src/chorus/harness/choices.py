"""Scores of probabilities over the choices of a task, which the harness does not have: NLL, ECE, AUROC."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chorus.ensemble.metrics import auroc, calibration_error


def choice_scores(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scores over a multiple-choice task's logged samples; empty of another kind of task.

    A choice's probability is its likelihood, normalised over the choices of its question. NLL of the right
    choice, nats; ECE of the most probable choice's probability; AUROC: how well 1 less that probability tells
    wrong answers from right ones. Of several right choices the most probable one counts. Questions whose
    right choice is not among them are left out.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return {}
    nlls, confidences, rights = [], [], []
    for sample in samples:
        count = len(task.doc_to_choice(sample["doc"]))
        likelihoods = [float(likelihood) for likelihood, _ in sample["filtered_resps"][:count]]
        log_prob_C = torch.tensor(likelihoods, dtype=torch.float64).log_softmax(-1)
        right = [index for index in _right(task, sample["doc"]) if index < count]
        if not right:
            continue
        nlls.append(-float(log_prob_C[right].max()))
        confidences.append(float(log_prob_C.max().exp()))
        rights.append(int(log_prob_C.argmax()) in right)
    if not nlls:
        return {}
    confidence_N, is_right_N = torch.tensor(confidences, dtype=torch.float64), torch.tensor(rights)
    return {
        "choice_nll": sum(nlls) / len(nlls),
        "choice_ece": calibration_error(confidence_N, is_right_N),
        "choice_auroc": auroc(1 - confidence_N, ~is_right_N) if 0 < sum(rights) < len(rights) else math.nan,
    }


def _right(task: Any, doc: Mapping[str, Any]) -> list[int]:
    """Indices of the right choices, read as the harness reads them."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        choices = task.doc_to_choice(doc)
        return [choices.index(gold)] if gold in choices else []
    return [index for index in (gold if isinstance(gold, list) else [gold]) if index >= 0]
