"""Tokenised rows for training, in memory or in a mapped file."""

from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from chorus.data.cache import TokenTable
from chorus.data.tokenise import LEARNT, MERGED


class Sample(NamedTuple):
    """A tokenised row, not yet shifted: `ids` int64 and, of
    equal length, `is_target` bool, the tokens to learn."""

    ids: Tensor
    is_target: Tensor

    @property
    def num_targets(self) -> int:
        """Tokens on which loss is due. Nothing predicts the first token."""
        return int(self.is_target[1:].sum())


class Samples(Sequence[Sample]):
    """Some rows of a table as samples, read on demand."""

    def __init__(self, table: TokenTable, rows: np.ndarray) -> None:
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return Samples(self.table, self.rows[index])
        ids_T, marks_T = self.table.tokens(int(self.rows[index]))
        return Sample(torch.from_numpy(ids_T.astype(np.int64)), torch.from_numpy(marks_T == LEARNT))

    @property
    def facts(self) -> np.ndarray:
        """`cache.FACTS` of each sample."""
        return self.table.facts[self.rows]

    @property
    def num_targets(self) -> np.ndarray:
        """Tokens with loss of each sample."""
        return self.table.facts["targets"][self.rows]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample before it is cut."""
        return self.table.facts["length"][self.rows]

    def is_merged(self, index: int) -> list[bool]:
        """For each token of a sample whether characters in it should carry loss, but do not."""
        return (self.table.tokens(int(self.rows[index])).marks_T == MERGED).tolist()

    def place(self, index: int) -> str:
        """Where a sample comes from, such as `train.jsonl:7`."""
        return self.table.place(int(self.rows[index]))
