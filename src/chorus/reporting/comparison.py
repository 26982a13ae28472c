"""Several runs on one page: one picture for each curve, and one table of scores."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from chorus.ensemble.metrics import auroc
from chorus.ensemble.tables import ScoreTable, label_of, score_table
from chorus.reporting.answer_pictures import risk_curve
from chorus.reporting.drawing import MUTED, SERIES, Picture, picture, thinned
from chorus.reporting.sources import RunRecord

CURVES = {
    "task_loss": ("loss", "Loss", "Mean cross-entropy of the agents, nats a token."),
    "swd": ("swd", "Distance between agents", "Sliced Wasserstein distance of hidden states, squared."),
    "grad_norm": ("grad_norm", "Gradient norm", "Of all agents together, before clipping."),
    "agent_tokens_per_second": ("throughput", "Throughput", "Agent-tokens a second."),
}


def comparison_table(runs: Sequence[RunRecord]) -> ScoreTable | None:
    """The mixture and the best agent of every run; None where no run has scores."""
    columns: dict[str, None] = {}
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        table = score_table(run.evaluation)
        if table is None:
            continue
        columns |= dict.fromkeys(table.columns)
        agents = [name for name in run.evaluation.scores if name.startswith("agent_") and "/" not in name]
        best = max(agents, key=lambda name: run.evaluation.scores[name]["cls/Acc"])
        for label in (table.chosen, label_of(best)):
            cells[f"{run.name}: {label}"] = dict(zip(table.columns, table.cells[label], strict=True))
    if not cells:
        return None
    rows = {label: [own.get(column, "") for column in columns] for label, own in cells.items()}
    return ScoreTable(list(columns), rows, "", "The mixture and the best agent of each run", None)


def comparison_pictures(runs: Sequence[RunRecord]) -> Iterator[Picture | str]:
    """A picture for each quantity that at least two of the runs have."""
    for column, (key, title, caption) in CURVES.items():
        curves = {
            run.name: [(row["step"], row.get(column)) for row in run.steps if row.get(column) is not None]
            for run in runs
        }
        found = _drawn(curves, runs, lambda points: thinned(points))
        yield (
            picture(key, title, caption, found) if found else f"{title}: fewer than two of the runs have it."
        )
    risks = {run.name: run.answers(run.mixture, ood=False) if run.mixture else [] for run in runs}
    found = _drawn(risks, runs, lambda own: risk_curve(own, "max_p"), is_by_step=False)
    if found is None:
        yield "Errors against coverage: fewer than two of the runs have a problems.jsonl."
        return
    caption = "Errors among the answers that the mixture's probability ranks surest; lower is better."
    yield picture("risk_coverage", "Errors against coverage", f"{caption} {_told(risks)}", found)


def _drawn(
    values: dict[str, list[Any]],
    runs: Sequence[RunRecord],
    curve: Callable[[list[Any]], tuple[list[float], list[float]]],
    *,
    is_by_step: bool = True,
) -> Callable[[Axes], None] | None:
    if sum(bool(own) for own in values.values()) < 2:
        return None

    def draw(axes: Axes) -> None:
        for number, run in enumerate(runs):
            if values[run.name]:
                axes.plot(*curve(values[run.name]), color=SERIES[number % len(SERIES)], label=run.name)
        axes.set_ylim(bottom=0)
        if is_by_step:
            axes.set_xlabel("optimiser step", color=MUTED)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
            return
        axes.set_xlim(0, 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("share of problems answered, the surest first", color=MUTED)
        axes.set_ylabel("errors among them", color=MUTED)

    return draw


def _told(answers: dict[str, list[Any]]) -> str:
    told = []
    for name, own in answers.items():
        if own:
            uncertainty_N = torch.tensor([one["uncertainty"]["max_p"] for one in own])
            value = auroc(uncertainty_N, ~torch.tensor([bool(one["right"]) for one in own]))
            told.append(f"{name} {value:.2f}")
    return f"AUROC of errors: {', '.join(told)}."
