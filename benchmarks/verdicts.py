"""Checks over the rows of table.py: equal losses, memory, the cost of ZeRO-2, scaling."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from case import Case
from results import Row

ENGINES = ("plain", "zero2")
KEY = (*Case._fields, "rank", "engine", "processes")

LARGE, LARGE_GB = "gemma-2-9b", 40  # with 4 agents or more, a GPU
AIMED_AT = {"model": "gemma-2-2b", "K": 4, "B": 4, "T": 512, "mode": "fused"}
AT_MOST_OVER_PLAIN = 0.05  # what ZeRO-2 may cost on one GPU
LEAST_SCALING = 0.95  # 4 GPUs give 3.8 times one
TOLERANCE = 1e-2  # of first losses in bf16, relative


class Verdict(NamedTuple):
    """A claim, whether it holds (None: its rows are not measured), and the figures."""

    claim: str
    holds: bool | None
    figures: str

    def __str__(self) -> str:
        said = {True: "true", False: "false", None: "open"}[self.holds]
        return f"{said}: {self.claim} ({self.figures})"


def name_of(row: Row) -> str:
    return (
        f"{row['model']} K={row['K']} {row['B']}x{row['T']} {row['mode']} {row['engine']} x{row['processes']}"
    )


def key_of(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def with_ratios(done: Sequence[Row]) -> list[Row]:
    """Each row with its cost over the plain engine and its
    efficiency over one process, where those are measured."""
    ms = {key_of(row): row["ms_per_step"] for row in done if "failed" not in row}
    result = []
    for row in done:
        key, own = key_of(row), ms.get(key_of(row))
        plain = ms.get((*key[:-2], "plain", key[-1]))
        alone = ms.get((*key[:-1], 1))  # as many rows on each process: the time should be equal
        result.append(
            {
                **row,
                "over_plain": own / plain - 1 if own and plain and row["engine"] == "zero2" else None,
                "scaling": alone / own if own and alone and row["processes"] > 1 else None,
            }
        )
    return result


def checks(done: Sequence[Row]) -> list[Verdict]:
    """All verdicts, of the rows that were measured."""
    rows = [row for row in with_ratios(done) if "failed" not in row]
    return [*equal_losses(rows), large_base_fits(rows), *aims(rows)]


def equal_losses(rows: Sequence[Row]) -> list[Verdict]:
    """Over modes, engines and numbers of processes: each row
    starts with the same agents and the same batch."""
    losses: dict[str, list[float]] = {}
    for row in rows:
        losses.setdefault(f"{row['model']} K={row['K']} {row['B']}x{row['T']}", []).append(
            fmean(row["first_loss"])
        )
    verdicts = []
    for shape, values in losses.items():
        differ = max(values) / min(values) - 1
        verdicts.append(
            Verdict(
                f"{shape}: the first losses agree", differ <= TOLERANCE, f"{len(values)} rows to {differ:.1e}"
            )
        )
    return verdicts


def large_base_fits(rows: Sequence[Row]) -> Verdict:
    """All rows of the large base must be below; the verdict names the one with the most memory."""
    claim = f"{LARGE} with K of 4 or more is under {LARGE_GB} GB a GPU"
    large = [row for row in rows if row["model"] == LARGE and row["K"] >= 4 and row["peak_gib"] is not None]
    if not large:
        return Verdict(claim, None, "not measured")
    fullest = max(large, key=gb)
    return Verdict(
        claim, gb(fullest) < LARGE_GB, f"{len(large)} rows, at most {gb(fullest):.1f} GB: {name_of(fullest)}"
    )


def aims(rows: Sequence[Row]) -> list[Verdict]:
    """The cost of ZeRO-2 on one process, and the scaling of each engine; on a CPU for the tiny base."""
    aimed_at = [row for row in rows if is_one_of(row, AIMED_AT)] or [
        row for row in rows if row["model"] == "tiny"
    ]
    claim = f"ZeRO-2 costs at most {AT_MOST_OVER_PLAIN:.0%} over plain on one process"
    alone = [row for row in aimed_at if row["over_plain"] is not None and row["processes"] == 1]
    verdicts = [
        Verdict(claim, row["over_plain"] <= AT_MOST_OVER_PLAIN, f"{name_of(row)}: {row['over_plain']:+.1%}")
        for row in alone
    ] or [Verdict(claim, None, "not measured")]
    claim = f"several processes give at least {LEAST_SCALING:.0%} of as many alone"
    several = [row for row in aimed_at if row["scaling"] is not None]
    return verdicts + (
        [
            Verdict(claim, row["scaling"] >= LEAST_SCALING, f"{name_of(row)}: {row['scaling']:.1%}")
            for row in several
        ]
        or [Verdict(claim, None, "not measured")]
    )


def is_one_of(row: Row, wanted: Row) -> bool:
    return all(row[name] == value for name, value in wanted.items())


def gb(row: Row) -> float:
    """GB a GPU: what the allocator of the fullest process reserved."""
    return row["peak_gib"] * 2**30 / 1e9
