"""Checks over the rows of table.py: equal losses, memory, the cost of ZeRO-2, weak and strong scaling."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from case import Case
from results import Row

ENGINES = ("plain", "zero2")
KEY = (*Case._fields, "rank", "engine", "processes")

LARGE, LARGE_GB = "gemma-2-9b", 40  # with 4 agents or more, a GPU
AIMED_AT = {"model": "gemma-2-2b", "K": 4, "T": 512, "mode": "fused"}
AT_MOST_OVER_PLAIN = 0.05  # what ZeRO-2 may cost on one GPU
LEAST_WEAK, LEAST_WEAK_SPREAD, LEAST_WEAK_ON_8 = (
    0.97,
    0.98,
    0.96,
)  # of one GPU; with agents over all GPUs; on 8
LEAST_STRONG = 3.5 / 4  # of as many times one GPU, for the row below over all GPUs
STRONG = {"model": "gemma-2-2b", "K": 16, "B": 1, "T": 512, "mode": "fused"}
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
    shape = f"{row['model']} K={row['K']} {row['B']}x{row['T']}"
    return f"{shape} {row['mode']} {row['engine']} x{row['processes']} A={row['A']}"


def key_of(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def with_ratios(done: Sequence[Row]) -> list[Row]:
    """Each row with what can be said of it where the rows to compare with are measured.

    GPUs of one kind differ by some percent, and the rows may be of several machines. So rates are taken by
    the large product that was timed in the same process.

    over_plain: its cost over the plain engine. weak: the rate of each GPU over that of one GPU with as many
    agents times rows. strong: its rate over that of one GPU with the same batch.
    """
    measured = [row for row in done if "failed" not in row]
    ms = {key_of(row): row["ms_per_step"] * row["matmul_tflops"] for row in measured}
    rate = {key_of(row): row["agent_tokens_per_second"] / row["matmul_tflops"] for row in measured}
    result = []
    for row in done:
        own, n, A = rate.get(key_of(row)), row["processes"], row["A"]
        plain = ms.get(key_of({**row, "engine": "plain"}))
        alone = rate.get(key_of({**row, "processes": 1, "A": 1, "B": row["B"] // A}))
        whole = rate.get(key_of({**row, "processes": 1, "A": 1, "B": row["B"] * n // A}))
        ratios = {
            "over_plain": ms[key_of(row)] / plain - 1 if own and plain and row["engine"] == "zero2" else None,
            "weak": own / n / alone if own and alone and n > 1 and row["B"] % A == 0 else None,
            "strong": own / whole if own and whole and n > 1 else None,
        }
        result.append({**row, **ratios})
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
    """The cost of ZeRO-2 on one process, and scaling; on a CPU for the tiny base."""
    aimed_at = [row for row in rows if is_one_of(row, AIMED_AT)] or [
        row for row in rows if row["model"] == "tiny"
    ]
    on_8 = [row for row in rows if row["processes"] == 8 and row["mode"] == "fused"]
    alone = [row for row in aimed_at if row["over_plain"] is not None and row["processes"] == 1]
    weak = [row for row in aimed_at if row["weak"] is not None and row["processes"] < 8]
    spread = [row for row in weak if row["A"] == row["processes"]]
    reduced = [row for row in weak if row["A"] == 1]
    strong = [row for row in rows if is_one_of(row, STRONG) and row["strong"] is not None]
    return [
        *_each(
            f"ZeRO-2 costs at most {AT_MOST_OVER_PLAIN:.0%} over plain on one process",
            [(row, row["over_plain"] <= AT_MOST_OVER_PLAIN, f"{row['over_plain']:+.1%}") for row in alone],
        ),
        *_each(
            f"weak scaling of DDP and ZeRO-2 is at least {LEAST_WEAK:.0%}",
            [(row, row["weak"] >= LEAST_WEAK, f"{row['weak']:.1%}") for row in reduced],
        ),
        *_each(
            f"weak scaling of agents over all processes is at least {LEAST_WEAK_SPREAD:.0%}",
            [(row, row["weak"] >= LEAST_WEAK_SPREAD, f"{row['weak']:.1%}") for row in spread],
        ),
        *_each(
            f"strong scaling of K=16 1x512 is at least {LEAST_STRONG:.0%}",
            [
                (row, row["strong"] >= LEAST_STRONG * row["processes"], f"{row['strong']:.2f}x")
                for row in strong
            ],
        ),
        *_each(
            f"weak scaling on 8 GPUs is at least {LEAST_WEAK_ON_8:.0%}",
            [(row, row["weak"] >= LEAST_WEAK_ON_8, f"{row['weak']:.1%}") for row in on_8 if row["weak"]],
        ),
    ]


def _each(claim: str, found: Sequence[tuple[Row, bool, str]]) -> list[Verdict]:
    """The claim of each row: whether it holds, and its figure."""
    told = [Verdict(claim, holds, f"{name_of(row)}: {figure}") for row, holds, figure in found]
    return told or [Verdict(claim, None, "not measured")]


def is_one_of(row: Row, wanted: Row) -> bool:
    return all(row[name] == value for name, value in wanted.items())


def gb(row: Row) -> float:
    """GB a GPU: what the allocator of the fullest process reserved."""
    return row["peak_gib"] * 2**30 / 1e9
