"""Samples of large parametrisations."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*factors: Sequence[Any]) -> list[tuple]:
    """Few of the combinations of these factors, such that any two values of two factors occur together.

    A fault that one value alone causes, or two together, shows in them. Greedy: at each turn the combination
    that adds the most pairs.
    """

    def pairs(choice: tuple) -> set[tuple]:
        return set(combinations(enumerate(choice), 2))

    indices = list(product(*(range(len(values)) for values in factors)))
    missing, chosen = set().union(*map(pairs, indices)), []
    while missing:
        best = max(indices, key=lambda choice: len(pairs(choice) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return [
        tuple(values[place] for values, place in zip(factors, one, strict=True)) for one in sorted(chosen)
    ]


def sampled(*factors: Sequence[Any]) -> list[Any]:
    """All combinations as parameters of a test; those beyond `pairwise` are slow."""
    kept = pairwise(*factors)
    return [
        pytest.param(*choice, marks=() if choice in kept else pytest.mark.slow)
        for choice in product(*factors)
    ]
