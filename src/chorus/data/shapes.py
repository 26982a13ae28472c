"""To which shapes the batches of a run are padded, where each shape costs seconds.

Layers are compiled, and passes captured, for every number of rows and every length. Few shapes start fast,
many waste few tokens on padding.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from chorus.data.packing import Layout, largest, smallest_layout

# A shape takes 10 to 20 s to compile and capture: 100 to 200 passes of a base of 135 M weights, some 60 of
# gemma-2-2b, 10 of gemma-2-9b (benchmarks/LOG.md).
PASSES_A_SHAPE = 30
MAX_SHAPES = 8
BATCHES = 1024  # that are looked at


class Shapes(NamedTuple):
    """Sizes to which batches are padded, the next larger one each; what is larger than all stays as it is.

    Attributes:
        rows: numbers of rows.
        lengths: tokens of a row.
    """

    rows: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    def padded(self, layout: Layout) -> Layout:
        """The layout with more rows, or longer ones. Samples keep their places."""
        return Layout(_next(layout.B, self.rows), _next(layout.T, self.lengths), layout.places)


ANY = Shapes()


def _next(size: int, sizes: tuple[int, ...]) -> int:
    return next((larger for larger in sizes if larger >= size), size)


def layouts_of_epochs(
    length_N: np.ndarray,
    epochs: Iterable[Sequence[np.ndarray]],
    batch_size: int,
    pad_to_multiple_of: int,
    packing: int | None,
) -> Iterator[Layout]:
    """The smallest layout of every batch of any process.

    Args:
        length_N: tokens of each sample.
        epochs: the order of the samples in each, or one order for every agent.
    """
    for orders in epochs:
        for start in range(0, len(length_N), batch_size):
            own = [length_N[order[start : start + batch_size]].tolist() for order in orders]
            yield largest([smallest_layout(lengths, pad_to_multiple_of, packing) for lengths in own])


def few_shapes(layouts: Iterable[Layout], packs: bool, num_passes: int) -> tuple[Shapes, str]:
    """The shapes that cost a run the least, and what the log says of them.

    Packed batches differ in their number of rows. Others differ in length; all get the rows of the largest,
    because the last batch of an epoch, which may have fewer, would be a shape of its own.

    Args:
        layouts: of the run's first batches, each as small as it can be.
        num_passes: how many batches the run has.
    """
    first = list(islice(layouts, BATCHES))
    tight = [layout.B if packs else layout.T for layout in first]
    sizes = few_sizes(tight, num_passes)
    shapes = Shapes(rows=sizes) if packs else Shapes((max(layout.B for layout in first),), sizes)
    padded = [shapes.padded(layout) for layout in first]
    more = sum(one.B * one.T for one in padded) / sum(one.B * one.T for one in first) - 1
    rows, lengths = ({getattr(one, side) for one in padded} for side in ("B", "T"))
    number = len(rows) * len(lengths)
    said = f"shapes of batches: {number}; {_words(rows)} rows of {_words(lengths)} tokens, "
    return shapes, f"{said}{more:.1%} more tokens than the smallest batches have"


def _words(sizes: set[int]) -> str:
    return " or ".join(str(size) for size in sorted(sizes))


def few_sizes(sizes: Sequence[int], num_passes: int) -> tuple[int, ...]:
    """At most `MAX_SHAPES` sizes, in order, to which these are rounded up at the least cost.

    A size costs as much as `PASSES_A_SHAPE` mean batches, of a run of `num_passes`. Exact, by dynamic
    programming over the distinct sizes.
    """
    size_D, count_D = np.unique(np.asarray(sizes), return_counts=True)
    price = PASSES_A_SHAPE / max(num_passes, 1) * float(np.dot(size_D, count_D))
    before_J = np.concatenate([[0], np.cumsum(count_D)])  # batches of the first j sizes
    added_JI = price + (before_J[1:, None] - before_J[None, :-1]) * size_D[:, None]
    added_JI[np.triu_indices(len(size_D), 1)] = np.inf
    # cost_J[j]: of covering the first j sizes with as many chosen ones as there were rounds
    cost_J = np.concatenate([[0.0], np.full(len(size_D), np.inf)])
    rounds: list[tuple[float, np.ndarray]] = []
    for _ in range(min(MAX_SHAPES, len(size_D))):
        total_JI = cost_J[None, :-1] + added_JI
        cost_J = np.concatenate([[np.inf], total_JI.min(1)])
        rounds.append((float(cost_J[-1]), total_JI.argmin(1)))
    number = min(range(len(rounds)), key=lambda number: rounds[number][0])
    chosen, covered = [], len(size_D)
    for _, from_J in reversed(rounds[: number + 1]):
        chosen.append(int(size_D[covered - 1]))
        covered = int(from_J[covered - 1])
    return tuple(reversed(chosen))
