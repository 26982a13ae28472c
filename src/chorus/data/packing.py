"""Several samples in one row of a batch, for less padding. The samples of a step are chosen before that.

Every sample keeps positions of its own and sees no other (`attention.attention_masks`).
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

MAX_SHAPES = 8  # of batches in a run: each may be compiled and captured


class Layout(NamedTuple):
    """Where the samples of a batch lie: in B rows of T tokens,
    each sample at places[sample] = (row, first token)."""

    B: int
    T: int
    places: list[tuple[int, int]]


def one_a_row(lengths: Sequence[int], multiple_of: int) -> Layout:
    """One row for each sample, as long as the longest, rounded up. Without samples: one row of padding."""
    T = ceil(max(lengths, default=1) / multiple_of) * multiple_of
    return Layout(max(len(lengths), 1), T, [(row, 0) for row in range(len(lengths))])


def packed(lengths: Sequence[int], max_length: int, multiple_of: int, batch_size: int) -> Layout:
    """Few rows, by first-fit decreasing (Johnson 1973: at most 11/9 of the minimum, plus one); no sample is
    cut.

    T is always `max_length` rounded up, and the number of rows is rounded up so that at most `MAX_SHAPES`
    numbers occur for up to `batch_size` samples.
    """
    T = ceil(max_length / multiple_of) * multiple_of
    filled: list[int] = []
    places = [(0, 0)] * len(lengths)
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        row = next((row for row, used in enumerate(filled) if used + lengths[sample] <= T), len(filled))
        if row == len(filled):
            filled.append(0)
        places[sample] = (row, filled[row])
        filled[row] += lengths[sample]
    step = ceil(batch_size / MAX_SHAPES)
    return Layout(min(ceil(max(len(filled), 1) / step) * step, batch_size), T, places)
