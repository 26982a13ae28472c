"""Several samples in one row of a batch, for less padding. The samples of a step are chosen before that.

Every sample keeps positions of its own and sees no other (`attention.attention_masks`).
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple


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


def packed(lengths: Sequence[int], max_length: int, multiple_of: int) -> Layout:
    """Few rows, by first-fit decreasing (Johnson 1973: at most 11/9 of the minimum, plus one); no sample is
    cut. T is always `max_length` rounded up.
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
    return Layout(max(len(filled), 1), T, places)


def smallest_layout(lengths: Sequence[int], pad_to_multiple_of: int, packing: int | None) -> Layout:
    """Of samples of so many tokens, the first of which is no target and the last no input; packed if samples
    have at most `packing` tokens."""
    inputs = [length - 1 for length in lengths]
    if packing is None:
        return one_a_row(inputs, pad_to_multiple_of)
    return packed(inputs, packing - 1, pad_to_multiple_of)


def largest(layouts: Sequence[Layout]) -> Layout:
    """The size of a batch in which each agent has one of these layouts; the places are the first one's."""
    return Layout(max(one.B for one in layouts), max(one.T for one in layouts), layouts[0].places)
