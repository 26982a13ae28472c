"""The pictures of quality.md: what each arm of a task gains over the best single LoRA, and its seconds."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quality_arms import APART, COMBINED, SINGLE
from quality_page import best_single, by_task, difference, picture_name
from results import Row

INCHES_OF_AN_ARM = 0.26


def draw_pictures(rows: Sequence[Row], out: Path) -> None:
    """Files beside the page; nothing without matplotlib."""
    try:
        from chorus.reporting.drawing import picture
    except ImportError:
        print("no pictures: pip install -e '.[report]' brings matplotlib")
        return
    for (base, task), own in by_task(rows).items():
        timed = [row for row in own if row["kind"] == "arm" and row.get("train_s", 0) > 0]
        if (best := best_single(timed)) is not None:
            name, size = picture_name(base, task), (7.2, 1.2 + INCHES_OF_AN_ARM * len(timed))
            drawn = picture(name, "", "", partial(_draw, measured=timed, best=best), size=size)
            (out / name).write_bytes(drawn.png)


def _draw(axes: Any, *, measured: Sequence[Row], best: Row) -> None:
    """A line for each arm: the difference and its paired interval, and its seconds at the right."""
    lines = [(row, found) for row in measured if (found := difference(row, best, "nll")) is not None]
    kinds = list(dict.fromkeys(_kind(row["arm"]) for row, _ in lines))
    errors = [[max(0.0, mean - low), max(0.0, high - mean)] for _, (mean, low, high) in lines]
    for kind in kinds:
        places = [place for place, (row, _) in enumerate(lines) if _kind(row["arm"]) == kind]
        means = [lines[place][1][0] for place in places]
        both = [[errors[place][side] for place in places] for side in (0, 1)]
        axes.errorbar(means, places, xerr=both, fmt="o", markersize=4, elinewidth=1.2, label=kind)
    axes.axvline(0, color="0.45", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [row["arm"] for row, _ in lines])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=6)  # differences of .001 have long labels
    axes.set_xlabel(f"calibrated NLL, nats, less that of {best['arm']}")
    seconds = axes.secondary_yaxis("right")
    seconds.set_yticks(range(len(lines)), [f"{row['train_s']:.1f} s" for row, _ in lines])
    seconds.spines["right"].set_visible(False)
    seconds.tick_params(length=0)


def _kind(arm: str) -> str:
    for name in (SINGLE, APART, COMBINED):
        if arm.startswith(name):
            return name
    return "agents on one batch" if arm.startswith("Chorus") else "K members of one LoRA"
