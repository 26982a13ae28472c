"""From samples to the batches of an optimiser step: labels, padding, order.

The labels are shifted here, in `collate`, and nowhere else. Which rows a step takes is a pure function of the
seed, the step and the global batch, so any number of processes sees the same rows, and a run resumes at any
step without reading the ones before it.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chorus.config.data import DataSettings
from chorus.config.training import TrainingSettings
from chorus.data.packing import one_a_row, packed
from chorus.data.samples import Sample, Samples
from chorus.errors import SIGNALS
from chorus.seeding import derive_seed


class Batch(NamedTuple):
    """S samples in B rows of equal length, one in each or, packed, several; padded on the right.

    input_BT: int64 token ids. target_BT: int64, the token that follows each input token. mask_BT: bool, where
    loss is due on target_BT: completion and end token, not prompt or padding. target_rows_N: int64, the
    places of the True in the flattened mask_BT. Known on the CPU, because a device would have
        to stop and count them.
    points_SM: int64, the places in the flattened B*T of the points that stand for a sample in the sliced
        Wasserstein distance: targets, evenly spaced, in order, then -1. Which of a sample's tokens they are
        depends on it alone.
    position_BT: packed: int64, each token's place within its sample. None: one sample a row, so that its
    place is t. sample_BT: packed: int64, the sample that each token is of, -1 for padding; no token may see
    another sample's.
    """

    input_BT: Tensor
    target_BT: Tensor
    mask_BT: Tensor
    target_rows_N: Tensor
    points_SM: Tensor
    position_BT: Tensor | None = None
    sample_BT: Tensor | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        moved = (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self)
        return Batch(*moved)  # pyright: ignore[reportArgumentType]


class StepBatch(NamedTuple):
    """What one process computes in one optimiser step, and how much the whole step holds.

    micro_batches: one per accumulation step. One without rows left is a single row of padding, with an
    all-False mask. num_targets: target tokens of the step over all processes and micro-batches: what a token
    mean divides by. num_rows: rows of the step over all processes and micro-batches. epoch: the epoch, from
    0, whose rows these are.
    """

    micro_batches: list[Batch]
    num_targets: int
    num_rows: int
    epoch: int


def collate(
    samples: Sequence[Sample],
    pad_id: int,
    pad_to_multiple_of: int = 1,
    points_per_row: int = 1,
    packing: tuple[int, int] | None = None,
) -> Batch:
    """Pad and shift samples: position t holds token t, and its target is token t + 1.

    One a row, T is the longest sample's length minus one, rounded up to `pad_to_multiple_of`; M is
    `points_per_row`. With `packing`, the most tokens of a sample and the most samples of a batch, several
    share a row. Of no samples it makes padding: a process without them still takes part in every collective
    of the step.
    """
    lengths = [len(sample.ids) - 1 for sample in samples]
    if packing is None:
        layout = one_a_row(lengths, pad_to_multiple_of)
    else:
        layout = packed(lengths, packing[0] - 1, pad_to_multiple_of, packing[1])
    B, T, places = layout
    input_BT = torch.full((B, T), pad_id)
    target_BT = torch.full((B, T), pad_id)
    mask_BT = torch.zeros(B, T, dtype=torch.bool)
    points_SM = torch.full((max(len(samples), 1), points_per_row), -1)
    position_BT, sample_BT = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -1)
    for number, ((ids, is_target), (row, start)) in enumerate(zip(samples, places, strict=True)):
        span = slice(start, start + len(ids) - 1)
        input_BT[row, span] = ids[:-1]
        target_BT[row, span] = ids[1:]
        mask_BT[row, span] = is_target[1:]
        position_BT[row, span] = torch.arange(len(ids) - 1)
        sample_BT[row, span] = number
        points = _evenly_spaced(is_target[1:].nonzero().squeeze(1), points_per_row)
        points_SM[number, : len(points)] = row * T + start + points
    batch = Batch(input_BT, target_BT, mask_BT, mask_BT.flatten().nonzero().squeeze(1), points_SM)
    return batch if packing is None else batch._replace(position_BT=position_BT, sample_BT=sample_BT)


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
    """The order in which an epoch takes the samples, int64: every index once."""
    if not shuffle:
        return torch.arange(num_samples)
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator)


def steps_per_epoch(
    num_samples: int, batch_size: int, gradient_accumulation_steps: int, num_processes: int
) -> int:
    """Optimiser steps that take every sample once; the last one may be short."""
    return ceil(num_samples / (batch_size * gradient_accumulation_steps * num_processes))


def step_rows(
    order: Tensor, step_in_epoch: int, batch_size: int, gradient_accumulation_steps: int, num_processes: int
) -> list[list[list[int]]]:
    """The samples of one step, as rows[micro_batch][process]: consecutive in `order`, each of at most
    `batch_size`.

    Processes share a micro-batch side by side, so that equal global batches hold the same rows in each step,
    whatever part of them is accumulated. In the last step of an epoch the later ones may be short or empty.
    """
    first = step_in_epoch * batch_size * gradient_accumulation_steps * num_processes
    starts = range(first, first + batch_size * gradient_accumulation_steps * num_processes, batch_size)
    rows = [order[start : start + batch_size].tolist() for start in starts]
    return [rows[start : start + num_processes] for start in range(0, len(rows), num_processes)]


def training_steps(
    samples: Sequence[Sample],
    data: DataSettings,
    training: TrainingSettings,
    *,
    points_per_row: int,
    pad_id: int,
    process_index: int,
    num_processes: int,
    num_steps: int,
    start_step: int = 0,
) -> Iterator[StepBatch]:
    """One process's part of the optimiser steps from `start_step` to `num_steps` - 1, epoch after epoch.

    Steps count over all epochs, from 0, and starting at one reads none of those before it. `num_workers`
    processes collate ahead, with equal results; they end with the iterator. `pad_id` may be any id of the
    vocabulary: no token sees it, and no loss falls on it.
    """
    loader = DataLoader(
        _Steps(samples, data, training, points_per_row, pad_id, process_index, num_processes),
        batch_size=None,
        sampler=range(start_step, num_steps),
        num_workers=data.num_workers,
        worker_init_fn=_leave_the_process_group,
        generator=torch.Generator(),  # the loader draws a seed that nothing uses: not from the global one
    )
    # A worker is born with the signals blocked, and so outlives one that comes before it has left the group.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Steps(Dataset[StepBatch]):
    """`steps[17]` is the process's part of step 17."""

    def __init__(
        self,
        samples: Sequence[Sample],
        data: DataSettings,
        training: TrainingSettings,
        points_per_row: int,
        pad_id: int,
        process_index: int,
        num_processes: int,
    ) -> None:
        self.samples, self.data, self.seed = samples, data, training.seed
        self.points_per_row, self.pad_id, self.process_index = points_per_row, pad_id, process_index
        is_table = isinstance(samples, Samples)  # which knows them without reading a token
        self.num_targets = samples.num_targets if is_table else [sample.num_targets for sample in samples]
        self.batch_size = training.batch_size
        self.global_batch = (training.batch_size, training.gradient_accumulation_steps, num_processes)
        self.steps_per_epoch = steps_per_epoch(len(samples), *self.global_batch)
        self.epoch, self.order = -1, torch.empty(0)

    def __getitem__(self, step: int) -> StepBatch:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:  # the order of a large data set takes longer than a step
            self.epoch = epoch
            self.order = epoch_order(len(self.samples), self.seed, epoch, self.data.shuffle)
        rows = step_rows(self.order, step_in_epoch, *self.global_batch)
        rows_of_all = [row for micro_batch in rows for part in micro_batch for row in part]
        return StepBatch(
            [self._collate(micro_batch[self.process_index]) for micro_batch in rows],
            num_targets=sum(int(self.num_targets[row]) for row in rows_of_all),
            num_rows=len(rows_of_all),
            epoch=epoch,
        )

    def _collate(self, rows: Sequence[int]) -> Batch:
        samples, data = [self.samples[row] for row in rows], self.data
        packing = (data.max_seq_length, self.batch_size) if data.packs else None
        return collate(samples, self.pad_id, data.padding, self.points_per_row, packing)


def _leave_the_process_group(worker: int) -> None:
    """A launcher's SIGTERM and a terminal's SIGINT go to the whole group. A worker that dies of one would
    fail the step that its trainer still wants to end; out of the group, it ends when its trainer does,
    whatever ends that."""
    os.setpgrp()
    while signal.sigtimedwait(SIGNALS, 0):
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _evenly_spaced(places_N: Tensor, count: int) -> Tensor:
    """`count` of the places, with the last and (of two or more)
    the first; all of them where there are no more."""
    last = len(places_N) - 1
    if last < count:
        return places_N
    return places_N[[last - i * last // max(count - 1, 1) for i in reversed(range(count))]]
