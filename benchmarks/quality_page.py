"""quality.md: the tables of quality.py, with intervals."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev, variance

import torch
from quality_arms import APART, SHARED, SINGLE
from results import Row, markdown_table

# Score, heading, digits.
COLUMNS = (
    ("accuracy", "right", 3),
    ("nll_plain", "NLL", 4),
    ("nll", "NLL cal.", 4),
    ("nll_member", "of a member", 4),
    ("brier", "Brier", 4),
    ("ece", "ECE", 3),
    ("auroc_errors", "AUROC err", 3),
    ("aurc", "AURC", 4),
    ("auroc_ood", "AUROC ood", 3),
    ("auroc_ood_mi", "ood by MI", 3),
    ("disagreement", "disagree", 3),
)
# What is compared, its heading, and the sign of a difference that is better.
COMPARED = (
    ("nll", "NLL cal.", -1),
    ("auroc_errors", "AUROC err", 1),
    ("auroc_ood", "AUROC ood", 1),
    ("accuracy", "right", 1),
)
HEAD = """\
# Is an ensemble worth it?

`python benchmarks/quality.py` measures what stands here; its docstring says how, and quality_arms.py what
the arms are. Every arm's rate, epochs, rank and strength were chosen on tuning rows, its temperature was
fitted to calibration rows, and the test rows were scored once. Scores are means over seeds, ± their standard
deviation. NLL and Brier are of a question, or of a token where answers are written; NLL cal. and what stands
right of it is at the fitted temperature. AUROC err tells wrong answers by their probability, AUROC ood rows
of another kind by entropy, or by the members' mutual information (MI). A difference comes with the 95 %
interval of a paired bootstrap over the test rows, of the mean over seeds; **bold** is better, outside of it.
The interval takes the trained runs as they are: † marks what is more than twice its standard error over the
seeds, too. Nothing is corrected for the number of comparisons.

A pass is one row through the base, forward and backward, for one agent. Seconds are those of one seed's
training, from the median step of a run of its own, without compilation.
"""


def page(rows: list[Row]) -> str:
    """The Markdown page of all rows."""
    parts = [HEAD]
    for (base, task), own in by_task(rows).items():
        measured = [row for row in own if row["kind"] == "arm" and "failed" not in row]
        stock = next((row for row in own if row["kind"] == "stock"), None)
        parts.append(f"## {task}, {base}\n")
        if measured:
            parts += [_scores(measured), _differences(measured), _verdict(measured) + _stock(measured, stock)]
            caption = "Calibrated NLL less that of the best single LoRA, by seconds of training"
            parts.append(f"![{caption}]({picture_name(base, task)})\n")
        parts.append(_tuning([row for row in own if row["kind"] == "tuning"]))
        failed = [f"- {row['arm']} ({row['kind']}): {row['failed']}" for row in own if "failed" in row]
        if failed:
            parts += ["Not measured:\n", "\n".join(failed) + "\n"]
        parts.append(_about(measured, stock))
    return "\n".join(part for part in parts if part)


def by_task(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each base and task."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["base"], row["task"]), []).append(row)
    return found


def picture_name(base: str, task: str) -> str:
    return f"quality-{task}-{base}.png"


def best_single(measured: Sequence[Row]) -> Row | None:
    """The single LoRA with the least NLL of the test rows, whatever its rank and number of steps.

    A choice in hindsight, which favours it: what is better than this one is better than any that tuning
    would have chosen.
    """
    singles = [row for row in measured if row["arm"].startswith(SINGLE)]
    return min(singles, key=lambda row: mean_of(row, "nll") or float("inf"), default=None)


def mean_of(row: Row, score: str) -> float | None:
    """The mean over seeds; None where it is not defined."""
    values = [own[score] for own in row["seeds"] if own.get(score) is not None]
    return fmean(values) if values and all(value == value for value in values) else None


def difference(row: Row, other: Row, score: str) -> tuple[float, float, float] | None:
    """row less other: the mean over seeds, and its 95 % interval; None where one lacks the score."""
    means = mean_of(row, score), mean_of(other, score)
    if None in means or score not in row["draws"] or score not in other["draws"]:
        return None
    apart_R = _draws(row, score) - _draws(other, score)
    low, high = apart_R.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return means[0] - means[1], low, high  # pyright: ignore[reportOptionalOperand]


def _draws(row: Row, score: str) -> torch.Tensor:
    return torch.tensor([float(value) for value in row["draws"][score].split()], dtype=torch.float64)


def is_better(row: Row, other: Row, score: str, sign: int) -> bool:
    """Whether it is so outside the interval."""
    found = difference(row, other, score)
    return found is not None and min(sign * found[1], sign * found[2]) > 0


def exceeds_seeds(row: Row, other: Row, score: str) -> bool:
    """Whether the difference is more than twice its standard error over the seeds.

    A row of one seed, which is the base's, has no spread to judge by.
    """
    found = difference(row, other, score)
    if found is None or min(len(one["seeds"]) for one in (row, other)) < 2:
        return False
    both = [[own[score] for own in one["seeds"]] for one in (row, other)]
    return abs(found[0]) > 2 * sum(variance(values) / len(values) for values in both) ** 0.5


def is_clearly_better(row: Row, other: Row, score: str, sign: int) -> bool:
    """Whether it is so outside the interval, and the difference exceeds the spread over seeds."""
    return is_better(row, other, score, sign) and exceeds_seeds(row, other, score)


def _scores(measured: Sequence[Row]) -> str:
    columns = [column for column in COLUMNS if any(mean_of(row, column[0]) is not None for row in measured)]
    head = ["arm", "K", *(heading for _, heading, _ in columns), "passes", "s"]
    lines = [head]
    for row in measured:
        cost = [f"{row['passes']:,}", f"{row['train_s']:.1f}"] if "passes" in row else ["", ""]
        cells = [_cell(row, score, digits) for score, _, digits in columns]
        lines.append([row["arm"], str(row["size"] or ""), *cells, *cost])
    return markdown_table(lines) + "\n"


def _cell(row: Row, score: str, digits: int) -> str:
    mean = mean_of(row, score)
    if mean is None:
        return ""
    values = [own[score] for own in row["seeds"]]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def _differences(measured: Sequence[Row]) -> str:
    """A table each: every arm less the best single LoRA, K independent ones, agents on one batch."""
    references = (best_single(measured), _named(measured, APART), _named(measured, SHARED))
    tables = [_less(measured, other) for other in references if other is not None and len(measured) > 1]
    return "\n".join(tables)


def _less(measured: Sequence[Row], other: Row) -> str:
    compared = [how for how in COMPARED if mean_of(other, how[0]) is not None]
    lines = [[f"less {other['arm']}", *(heading for _, heading, _ in compared)]]
    for row in measured:
        if row is other:
            continue
        cells = []
        for score, _, sign in compared:
            found = difference(row, other, score)
            text = "" if found is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*found)
            text += " †" if exceeds_seeds(row, other, score) else ""
            cells.append(f"**{text}**" if text and is_better(row, other, score, sign) else text)
        lines.append([row["arm"], *cells])
    return markdown_table(lines) + "\n"


def _named(measured: Sequence[Row], name: str) -> Row | None:
    return next((row for row in measured if row["arm"] == name), None)


def _verdict(measured: Sequence[Row]) -> str:
    """What beats single LoRAs in calibrated NLL and in telling errors or other rows, and at what cost."""
    best, apart = best_single(measured), _named(measured, APART)
    if best is None:
        return ""
    ensembles = [row for row in measured if row["size"] > 1]
    better = [row for row in ensembles if is_better_than_all(row, [best])]
    lines = [
        f"Best single LoRA, by the test rows themselves: {best['arm']}, {best['train_s']:.1f} s of training.",
        "Better than it in calibrated NLL and in AUROC err or ood, outside the intervals: "
        + _list(better, best),
        "Of these, in both by more than twice the standard error over the seeds: "
        + _names([row for row in better if is_better_than_all(row, [best], is_clearly_better)]),
        "Outside the intervals better than every single LoRA that took no longer: "
        + _names([row for row in ensembles if is_better_than_all(row, _no_longer_than(row, measured))]),
    ]
    if apart is not None:
        above = [row for row in ensembles if row is not apart and is_better(row, apart, "nll", -1)]
        lines.append(f"Better than {APART} in calibrated NLL, outside the intervals: " + _list(above, apart))
    return "\n".join(f"- {line}" for line in lines) + "\n"


def is_better_than_all(
    row: Row, others: Sequence[Row], judge: Callable[[Row, Row, str, int], bool] = is_better
) -> bool:
    """Whether its calibrated NLL is better than that of each, and one AUROC is, by the judge."""
    return (
        bool(others)
        and all(judge(row, other, "nll", -1) for other in others)
        and any(
            all(judge(row, other, score, 1) for other in others) for score in ("auroc_errors", "auroc_ood")
        )
    )


def _no_longer_than(row: Row, measured: Sequence[Row]) -> list[Row]:
    """The single LoRAs that took at most the row's seconds of training."""
    singles = [other for other in measured if other["arm"].startswith(SINGLE)]
    return [other for other in singles if other["train_s"] <= row["train_s"]]


def _stock(measured: Sequence[Row], stock: Row | None) -> str:
    """The time of K agents beside that of as many runs with stock PEFT."""
    if stock is None or "failed" in stock:
        return ""
    ms = stock["ms_per_step"]
    named = [
        f"{row['arm']} {row['train_s']:.1f} s, "
        f"{row['agents']} runs with stock PEFT {row['agents'] * row['steps'] * ms / 1000:.1f} s"
        for row in measured
        if row["arm"].startswith((SHARED, APART)) and row["rank"] == stock["rank"]
    ]
    return f"- A step of stock PEFT takes {ms:.1f} ms: {'; '.join(named) or 'no agents to compare'}.\n"


def _list(rows: Sequence[Row], other: Row) -> str:
    named = [f"{row['arm']} ({row['train_s'] / other['train_s']:.1f} times its seconds)" for row in rows]
    return ("; ".join(named) or "none") + "."


def _names(rows: Sequence[Row]) -> str:
    return ("; ".join(row["arm"] for row in rows) or "none") + "."


def _tuning(tried: Sequence[Row]) -> str:
    """What was tried, the NLL of the tuning rows by rate; the least of an arm in bold."""
    tried = [row for row in tried if "failed" not in row]
    if not tried:
        return ""
    rates = sorted({rate for row in tried for rate in row["rates"]})
    best: dict[str, float] = {}
    for row in tried:
        best[row["arm"]] = min(
            [best.get(row["arm"], float("inf")), *(nll for nll in row["nll"] if nll == nll)]
        )
    lines = [["tuning", "epochs", "variant", *(f"{rate:g}" for rate in rates)]]
    for row in tried:
        of_rate = dict(zip(row["rates"], row["nll"], strict=True))
        cells = []
        for rate in rates:
            text = f"{of_rate[rate]:.4f}" if rate in of_rate else ""
            cells.append(f"**{text}**" if rate in of_rate and of_rate[rate] == best[row["arm"]] else text)
        variant = ", ".join(f"{key} {value}" for key, value in row["variant"].items())
        lines.append([row["arm"], str(row["epochs"]), variant, *cells])
    return markdown_table(lines) + "\n" + _at_the_edge(tried)


def _at_the_edge(tried: Sequence[Row]) -> str:
    """The arms whose best rate is the smallest or the largest that was tried: a better one may lie beyond."""
    best: dict[str, tuple[float, bool]] = {}
    for row in tried:
        for rate, nll in zip(row["rates"], row["nll"], strict=True):
            if nll == nll and nll < best.get(row["arm"], (float("inf"), False))[0]:
                best[row["arm"]] = nll, rate in (min(row["rates"]), max(row["rates"]))
    named = [arm for arm, (_, is_edge) in best.items() if is_edge]
    return f"\nBest at the edge of the rates: {'; '.join(named)}.\n" if named else ""


def _about(measured: Sequence[Row], stock: Row | None) -> str:
    """On what, and by which commands: scores first, then times that were taken again."""
    again = [row["timed"] for row in measured if "timed" in row]
    by_stock = [stock["about"]] if stock is not None and "about" in stock else []
    parts = (("", [row["about"] for row in measured]), ("times: ", again), ("stock PEFT: ", by_stock))
    return "\n".join(line for what, all_of in parts for line in _machines(what, all_of)) + "\n"


def _machines(what: str, all_of: Iterable[Row]) -> list[str]:
    """A line for each command on each commit."""
    lines = (
        f"- {what}{about['device']}, {about['dtype']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, commit {about['commit']}: `{about['command']}`"
        for about in all_of
    )
    return list(dict.fromkeys(lines))
