"""Scores as a table for people."""

import math
from typing import NamedTuple

from rich.table import Table

from chorus.ensemble.evaluate import CALIBRATED, FITTED, UNIFORM, Evaluation

LABELS = {"base": "base", UNIFORM: "mixture", FITTED: "fitted"}


class ScoreTable(NamedTuple):
    """Scores as text: one row for each answerer.

    Attributes:
        columns: what each cell of a row is.
        cells: by the row's label.
        chosen: the label of the mixture that ensemble.json holds.
        title: how many problems there were.
        caption: what the mixture gains over its best member; None where that is not known.
    """

    columns: list[str]
    cells: dict[str, list[str]]
    chosen: str
    title: str
    caption: str | None


def score_table(found: Evaluation) -> ScoreTable | None:
    """Accuracy, NLL before and after calibration, quality of the uncertainty; None if nothing was scored."""
    if not found.num_problems:
        return None
    nll = "cls/NLL" if found.is_choice else "token/NLL"
    columns = [
        ("right", lambda plain, fitted: _percent(plain["cls/Acc"])),
        ("NLL", lambda plain, fitted: f"{plain[nll]:.4f}"),
    ]
    if found.num_calibration:
        columns += [("NLL cal.", lambda plain, fitted: f"{fitted[nll]:.4f}")]
    columns += [
        ("ECE", lambda plain, fitted: _percent(fitted["cal/ECE"])),
        ("AUROC err", lambda plain, fitted: _number(fitted["sc/AUROC/max_p"])),
        ("risk@80%", lambda plain, fitted: _percent(fitted["sc/Risk@80Cov/max_p"])),
    ]
    if found.num_ood:
        columns += [("AUROC ood", lambda plain, fitted: _number(fitted["ood/AUROC/entropy"]))]
    cells = {}
    for name, plain in found.scores.items():
        if not name.endswith(f"/{CALIBRATED}"):
            fitted = found.scores[f"{name}/{CALIBRATED}"]
            cells[label_of(name)] = [cell(plain, fitted) for _, cell in columns]
    names = [name for name, _ in columns]
    return ScoreTable(names, cells, label_of(found.chosen), _title(found), _caption(found))


def label_of(answerer: str) -> str:
    """How people call an answerer."""
    return LABELS.get(answerer, answerer.replace("_", " "))


def evaluation_table(found: Evaluation) -> Table:
    """The table of scores for a terminal."""
    scores = score_table(found)
    if scores is None:
        return Table("no held-out problems, nothing scored")
    table = Table(title=scores.title, caption=scores.caption)
    table.add_column("")
    for name in scores.columns:
        table.add_column(name, justify="right")
    for label, cells in scores.cells.items():
        table.add_row(label, *cells, style="bold" if label == scores.chosen else None)
    return table


def _title(found: Evaluation) -> str:
    beside = [f"{found.num_calibration} to calibrate on"] if found.num_calibration else []
    beside += [f"{found.num_ood} out of distribution"] if found.num_ood else []
    return ", ".join([f"{found.num_problems} held-out problems", *beside])


def _caption(found: Evaluation) -> str | None:
    """What the mixture gains over its best member, with the paired interval of the exact match."""
    members = [name for name in found.differences if name.startswith("agent_") and "/" not in name]
    if not members:
        return None
    best = max(members, key=lambda name: found.scores[name]["cls/Acc"])
    gain = found.scores[found.chosen]["cls/Acc"] - found.scores[best]["cls/Acc"]
    low, high = found.differences[best]["cls/Acc"]
    unit = "question" if found.is_choice else "token"
    return (
        f"The mixture is right {gain:+.1%} more often than its best member (95 % interval {0 - high:+.1%} "
        f"to {0 - low:+.1%}, paired bootstrap). NLL in nats a {unit}; errors are told by the answer's "
        "probability, what is out of distribution by entropy."
    )


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"
