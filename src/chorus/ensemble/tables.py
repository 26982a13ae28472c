"""Scores as a table for people."""

import math

from rich.table import Table

from chorus.ensemble.evaluate import CALIBRATED, FITTED, UNIFORM, Evaluation

LABELS = {"base": "base", UNIFORM: "mixture", FITTED: "fitted"}


def evaluation_table(found: Evaluation) -> Table:
    """A row an answerer: right answers, NLL before and after calibration, what its uncertainty tells."""
    if not found.num_problems:
        return Table("no held-out problems, nothing scored")
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
    table = Table(title=_title(found), caption=_caption(found))
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for name, plain in found.scores.items():
        if name.endswith(f"/{CALIBRATED}"):
            continue
        fitted = found.scores[f"{name}/{CALIBRATED}"]
        style = "bold" if name == found.chosen else None
        label = LABELS.get(name, name.replace("_", " "))
        table.add_row(label, *(cell(plain, fitted) for _, cell in columns), style=style)
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
