"""The rows of table.py: models x modes x engines x meshes x numbers of GPUs, those that matter most first."""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from case import Case
from results import Row
from verdicts import ENGINES, key_of, name_of

from chorus.config.execution import MODES
from chorus.mesh import divisors
from chorus.model.kernels.decoder_layers import Recompute


class Shape(NamedTuple):
    """What a GPU computes by itself. On n GPUs the batch is n times as large (weak scaling).

    Attributes:
        gib: what the fused mode takes of one GPU, by measurement or forecast.
    """

    model: str
    K: int
    B: int
    T: int
    recompute: Recompute
    gib: float


ON_GPU = (
    Shape("gemma-2-2b", 2, 4, 512, "none", 18),
    Shape("gemma-2-2b", 4, 4, 512, "none", 30),
    Shape("gemma-2-2b", 8, 4, 512, "none", 54),
    Shape("gemma-2-2b", 16, 4, 512, "selective", 65),
    Shape("gemma-2-9b", 4, 4, 1024, "full", 30),
    Shape("gemma-2-9b", 8, 4, 1024, "full", 43),
)
# The same batch on any number of GPUs (strong scaling): B is that of one GPU.
STRONG_ON_GPU = (
    Shape("gemma-2-2b", 16, 1, 512, "none", 35),
    Shape("gemma-2-2b", 4, 4, 512, "none", 30),
)
ON_CPU = (Shape("tiny", 2, 2, 16, "none", 0),)


def first() -> Iterator[str]:
    """The rows that the checks need, most important first. Neighbours share a launch."""
    small, large = "gemma-2-2b", "gemma-2-9b"
    yield from (
        f"{small} {shape} fused plain x1" for shape in ("K=4 4x512", "K=16 1x512", "K=8", "K=16 4x512")
    )
    yield f"{small} K=4 fused zero2 x1"
    yield from (f"{large} {K} fused plain x1" for K in ("K=4", "K=8"))
    yield from (f"{large} K=4 {mode} zero2 x1" for mode in MODES)
    yield from (f"{small} K=2 {mode} plain x1" for mode in MODES)
    for n in (2, 4, 8):
        K = "K=8" if n == 8 else "K=4"
        yield from (f"{small} {shape} fused plain x{n} A=1" for shape in (f"{K} 4x512", f"K=4 {4 // n}x512"))
        yield f"{small} {K} 4x512 fused zero2 x{n} A=1"
        shapes = (f"{K} {4 * n}x512", "K=16 1x512", "K=4 4x512", f"K=8 {4 * n}x512", f"K=16 {4 * n}x512")
        yield from (f"{small} {shape} fused plain x{n} A={n}" for shape in shapes)
        yield f"{small} {K} {4 * n}x512 fused zero2 x{n} A={n}"
        yield from (f"{large} {K} fused plain x{n} A={n}" for K in ("K=4", "K=8"))
        yield from (f"{large} {K} fused zero2 x{n} A=1" for K in ("K=4", "K=8"))
        yield from (f"{large} K=4 {mode} zero2 x{n} A=1" for mode in ("sequential", "parallel"))
    yield from (f"{model} K=8 fused plain x8 A={A}" for model in (small, large) for A in (1, 2, 4))


FIRST = tuple(first())


def rows(options: argparse.Namespace, shapes: Sequence[Shape], strong: Sequence[Shape] = ()) -> list[Row]:
    """The rows that the options ask for and that fit: those of FIRST, then the fewest processes."""
    found: dict[tuple, Row] = {}
    for processes in options.processes:
        for engine in ENGINES:
            for mode in MODES:
                for case in cases(mode, processes, shapes, strong):
                    of_the_launch = {"rank": options.rank, "engine": engine, "processes": processes}
                    row = {**case._replace(attention=options.attention)._asdict(), **of_the_launch}
                    found[key_of(row)] = {**row, "steps": options.steps, "with_trace": options.trace}
    wanted = [
        row
        for row in found.values()
        if not options.rows or any(is_named(row, words) for words in options.rows)
    ]
    return sorted(wanted, key=lambda row: (rank_of(row), row["processes"], row["A"]))


def cases(mode: str, processes: int, shapes: Sequence[Shape], strong: Sequence[Shape]) -> Iterator[Case]:
    """The cases of a mode on so many GPUs, each in every mesh that has a row.

    Agents that are spread over A GPUs see the rows of A GPUs: so a process has A times as many rows.
    """
    for A in divisors(processes) if mode == "fused" else [1]:
        for shape in (one for one in shapes if one.K % A == 0):
            yield case_of(shape, mode, shape.B * A, A)
        for shape in (one for one in strong if mode == "fused"):
            if shape.K % A == 0 and shape.B * A % processes == 0:
                yield case_of(shape, mode, shape.B * A // processes, A)


def case_of(shape: Shape, mode: str, B: int, A: int) -> Case:
    return Case(shape.model, mode, shape.K, B, shape.T, shape.recompute, "auto", "auto", A=A)


def rank_of(row: Row) -> int:
    """The row's place among the first ones, or behind them."""
    return next((place for place, name in enumerate(FIRST) if is_named(row, name)), len(FIRST))


def is_named(row: Row, words: str) -> bool:
    return set(words.split()) <= set(name_of(row).split())
