"""From samples to the batches of an optimiser step: labels, padding, order.

The labels are shifted here, in `_filled`, and nowhere else. Which rows a step takes is a pure function of the
seed, the step and the global batch, so any number of processes sees the same rows, and a run resumes at any
step without reading the ones before it.
"""

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chorus.config.data import DataSettings
from chorus.config.training import TrainingSettings
from chorus.data.bootstrap import bootstrap_weights
from chorus.data.order import epoch_order, step_rows, steps_per_epoch
from chorus.data.packing import Layout, largest, smallest_layout
from chorus.data.samples import Sample, Samples
from chorus.data.shapes import ANY, Shapes, few_shapes, layouts_of_epochs
from chorus.errors import SIGNALS

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """S samples in B rows of equal length, one in each or, packed, several; padded on the right.

    All agents see these rows, or each has S samples in B rows of its own: then the tensors of rows hold K x B
    rows, one agent's after the other's.

    Attributes:
        input_BT: int64 token ids.
        target_BT: int64, the token that follows each input token.
        mask_BT: bool, where loss is due on target_BT: completion and end token, not prompt or padding.
        target_rows_N: int64, the places of the True in the flattened mask_BT. Found on the CPU, because a
            device would have to stop and count them.
        points_SM: int64, the places in the flattened B*T of the points that stand for a sample in the sliced
            Wasserstein distance: targets, evenly spaced, in order, then -1. Which of a sample's tokens they
            are depends on the sample alone. Agents with rows of their own have none.
        position_BT: packed: int64, each token's place within its sample. None: one sample a row, so that its
            place is t.
        sample_BT: packed: int64, the sample that each token is of, counted within an agent's own, -1 for
            padding; no token may see another sample's.
        weight_KS: fp32, by what the loss of each sample's tokens is multiplied, for each agent that this
            process holds. None: 1.
        own_targets: for each agent with rows of its own, how many of target_rows_N are its. None: all agents
            see the same rows.
    """

    input_BT: Tensor
    target_BT: Tensor
    mask_BT: Tensor
    target_rows_N: Tensor
    points_SM: Tensor
    position_BT: Tensor | None = None
    sample_BT: Tensor | None = None
    weight_KS: Tensor | None = None
    own_targets: tuple[int, ...] | None = None

    @property
    def num_sets(self) -> int:
        """How many sets of rows the tensors hold: one for all agents, or one for each."""
        return 1 if self.own_targets is None else len(self.own_targets)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        moved = (part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)
        return Batch(*moved)  # pyright: ignore[reportArgumentType]

    def rows_of(self, places: Sequence[int], tensor_BT: Tensor) -> Tensor:
        """The part of a tensor of rows that a pass of some agents reads: N x T, agent by agent.

        Args:
            places: of these agents among those of this process: neighbours, in order.
        """
        if self.own_targets is None:
            return tensor_BT.repeat(len(places), 1)
        B = len(tensor_BT) // len(self.own_targets)
        return tensor_BT[places[0] * B : (places[-1] + 1) * B]

    def inputs_of(self, places: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same for input_BT, position_BT and sample_BT."""
        packed = (self.position_BT, self.sample_BT)
        position_NT, sample_NT = (None if one is None else self.rows_of(places, one) for one in packed)
        return self.rows_of(places, self.input_BT), position_NT, sample_NT

    def target_rows_of(self, places: Sequence[int]) -> Tensor:
        """The places of their targets in such a tensor, flattened."""
        size = self.input_BT.numel() // self.num_sets
        if self.own_targets is None:
            first_K = torch.arange(len(places), device=self.target_rows_N.device) * size
            return (first_K[:, None] + self.target_rows_N).flatten()
        start, stop = (sum(self.own_targets[:place]) for place in (places[0], places[-1] + 1))
        return self.target_rows_N[start:stop] - places[0] * size


class StepBatch(NamedTuple):
    """One process's part of an optimiser step, and the size of the whole step.

    Attributes:
        micro_batches: one per accumulation step. One without rows left is a single row of padding, with an
            all-False mask.
        num_targets: target tokens of the step over all processes and micro-batches, the divisor of a token
            mean. If agents have rows of their own, the count of this process's first agent; weight_KS
            corrects for the others.
        num_rows: rows that an agent sees in the step, over all processes and micro-batches.
        epoch: the epoch, from 0, whose rows these are.
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
    packing: int | None = None,
    shapes: Shapes = ANY,
) -> Batch:
    """Pad and shift samples: position t holds token t, and its target is token t + 1.

    One a row, T is the longest sample's length minus one, rounded up to `pad_to_multiple_of`; M is
    `points_per_row`. With `packing`, the most tokens of a sample, several share a row. Rows of padding that
    `shapes` adds stand for samples without targets. Without samples it returns padding: such a process
    still takes part in every collective of the step.
    """
    lengths = [len(sample.ids) for sample in samples]
    layout = shapes.padded(smallest_layout(lengths, pad_to_multiple_of, packing))
    return _filled(samples, layout, pad_id, points_per_row, packing is not None)


def collate_apart(
    samples_of_agents: Sequence[Sequence[Sample]],
    pad_id: int,
    pad_to_multiple_of: int = 1,
    packing: int | None = None,
    shapes: Shapes = ANY,
) -> Batch:
    """One batch in which each agent has samples of its own, as many as the others; as `collate` otherwise.

    All are padded to the longest row, and to the most rows, that an agent has.
    """
    lengths = [[len(sample.ids) for sample in samples] for samples in samples_of_agents]
    layouts = [smallest_layout(own, pad_to_multiple_of, packing) for own in lengths]
    B, T, _ = shapes.padded(largest(layouts))
    parts = [
        _filled(samples, Layout(B, T, layout.places), pad_id, 0, packing is not None)
        for samples, layout in zip(samples_of_agents, layouts, strict=True)
    ]
    together = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("input_BT", "target_BT", "mask_BT", "position_BT", "sample_BT")
        if getattr(parts[0], name) is not None
    }
    return Batch(
        **together,
        target_rows_N=torch.cat([part.target_rows_N + k * B * T for k, part in enumerate(parts)]),
        points_SM=parts[0].points_SM,  # none
        own_targets=tuple(len(part.target_rows_N) for part in parts),
    )


def _filled(
    samples: Sequence[Sample], layout: Layout, pad_id: int, points_per_row: int, is_packed: bool
) -> Batch:
    B, T, places = layout
    input_BT = torch.full((B, T), pad_id)
    target_BT = torch.full((B, T), pad_id)
    mask_BT = torch.zeros(B, T, dtype=torch.bool)
    points_SM = torch.full((max(len(samples), 1) if is_packed else B, points_per_row), -1)
    position_BT, sample_BT = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), -1)
    for number, ((ids, is_target), (row, start)) in enumerate(zip(samples, places, strict=True)):
        span = slice(start, start + len(ids) - 1)
        input_BT[row, span] = ids[:-1]
        target_BT[row, span] = ids[1:]
        mask_BT[row, span] = is_target[1:]
        if is_packed:
            position_BT[row, span] = torch.arange(len(ids) - 1)
            sample_BT[row, span] = number
        if points_per_row:
            points = _evenly_spaced(is_target[1:].nonzero().squeeze(1), points_per_row)
            points_SM[number, : len(points)] = row * T + start + points
    batch = Batch(input_BT, target_BT, mask_BT, mask_BT.flatten().nonzero().squeeze(1), points_SM)
    return batch._replace(position_BT=position_BT, sample_BT=sample_BT) if is_packed else batch


def training_steps(
    samples: Sequence[Sample],
    data: DataSettings,
    training: TrainingSettings,
    *,
    agents: Sequence[int],
    points_per_row: int,
    pad_id: int,
    process_index: int,
    num_processes: int,
    num_steps: int,
    start_step: int = 0,
    wants_few_shapes: bool = False,
) -> Iterator[StepBatch]:
    """One process's part of the optimiser steps from `start_step` to `num_steps` - 1, epoch after epoch.

    Steps count over all epochs, from 0, and starting at one reads none of those before it. `num_workers`
    processes collate ahead, with equal results; they end with the iterator.

    Args:
        agents: that this process holds.
        pad_id: may be any id of the vocabulary: no token sees it, and no loss falls on it.
        wants_few_shapes: each shape of a batch costs seconds: pad to few of them, and say so in the log.

    Raises:
        InputError: bootstrap weights leave an agent without rows.
    """
    steps = _Steps(samples, data, training, agents, points_per_row, pad_id, process_index, num_processes)
    if wants_few_shapes:
        steps.choose_shapes(num_steps)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start_step, num_steps),
        num_workers=data.num_workers,
        worker_init_fn=_leave_the_process_group,
        generator=torch.Generator(),  # the loader draws an unused seed; not from the global generator
    )
    # A worker starts with signals blocked, so one that arrives before it has left the group cannot end it.
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
        agents: Sequence[int],
        points_per_row: int,
        pad_id: int,
        process_index: int,
        num_processes: int,
    ) -> None:
        self.samples, self.data, self.seed, self.agents = samples, data, training.seed, agents
        self.points_per_row, self.pad_id, self.process_index = points_per_row, pad_id, process_index
        self.shapes = ANY
        is_table = isinstance(samples, Samples)  # known without reading tokens
        num_targets = samples.num_targets if is_table else [sample.num_targets for sample in samples]
        self.num_targets_N = torch.from_numpy(np.array(num_targets, dtype=np.int64))
        self.batch_size = training.batch_size
        self.global_batch = (training.batch_size, training.gradient_accumulation_steps, num_processes)
        self.steps_per_epoch = steps_per_epoch(len(samples), *self.global_batch)
        self.epoch, self.orders = -1, list[Tensor]()
        self.weight_KN = None
        if data.bootstrap != "none":
            self.weight_KN = bootstrap_weights(data.bootstrap, self.seed, agents, self.num_targets_N)

    def __getitem__(self, step: int) -> StepBatch:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:  # the order of a large data set takes longer than a step
            self.epoch, self.orders = epoch, self._orders(epoch)
        # rows[order][micro_batch][process]; an order is all agents', or one agent's own
        rows = [step_rows(order, step_in_epoch, *self.global_batch) for order in self.orders]
        rows_of_all = [[row for micro_batch in one for part in micro_batch for row in part] for one in rows]
        num_targets = [int(self.num_targets_N[one].sum()) for one in rows_of_all]
        micro_batches = [
            self._micro_batch([own[self.process_index] for own in of_orders], num_targets)
            for of_orders in zip(*rows, strict=True)
        ]
        return StepBatch(micro_batches, num_targets[0], num_rows=len(rows_of_all[0]), epoch=epoch)

    def _orders(self, epoch: int) -> list[Tensor]:
        """The epoch's order of the samples: all agents', or one for each."""
        of_whom = self.agents if self.data.per_agent_batches else (None,)
        order = (len(self.samples), self.seed, epoch, self.data.shuffle)
        return [epoch_order(*order, agent) for agent in of_whom]

    def choose_shapes(self, num_steps: int) -> None:
        """Decide to which shapes batches are padded, from the first ones of all processes: each gets the
        same ones, so that all compile at the same time."""
        if isinstance(self.samples, Samples):
            length_N = self.samples.lengths.clip(max=self.data.max_seq_length)
        else:
            length_N = np.array([len(sample.ids) for sample in self.samples])
        epochs = ([order.numpy() for order in self._orders(epoch)] for epoch in count())
        how = (self.batch_size, self.data.padding, self._packing)
        layouts = layouts_of_epochs(length_N, epochs, *how)
        num_passes = num_steps * self.global_batch[1]
        self.shapes, said = few_shapes(layouts, self.data.packs, num_passes)
        logger.info(said)

    @property
    def _packing(self) -> int | None:
        return self.data.max_seq_length if self.data.packs else None

    def _micro_batch(self, rows: Sequence[Sequence[int]], num_targets: Sequence[int]) -> Batch:
        """The batch of one list of rows for all agents, or one for each; likewise the step's targets."""
        samples, data = [[self.samples[row] for row in own] for own in rows], self.data
        how = (self._packing, self.shapes)
        if data.per_agent_batches:
            batch = collate_apart(samples, self.pad_id, data.padding, *how)
        else:
            batch = collate(samples[0], self.pad_id, data.padding, self.points_per_row, *how)
        return batch._replace(weight_KS=self._weights(rows, num_targets, len(batch.points_SM)))

    def _weights(
        self, rows: Sequence[Sequence[int]], num_targets: Sequence[int], num_samples: int
    ) -> Tensor | None:
        if self.weight_KN is None and not self.data.per_agent_batches:
            return None
        weight_KS = torch.ones(len(self.agents), num_samples)  # rows of padding are samples, too
        if self.weight_KN is not None and rows[0]:
            drawn_KS = self.weight_KN.gather(1, torch.tensor(rows).expand(len(self.agents), -1))
            weight_KS[:, : drawn_KS.shape[1]] = drawn_KS
        return weight_KS * (num_targets[0] / torch.tensor(num_targets))[:, None]


def _leave_the_process_group(worker: int) -> None:
    """A launcher's SIGTERM and a terminal's SIGINT go to the whole process group. A worker killed by one
    would fail the step that its trainer still has to finish. Outside of it a worker ends with its trainer.
    """
    os.setpgrp()
    while signal.sigtimedwait(SIGNALS, 0):
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _evenly_spaced(places_N: Tensor, count: int) -> Tensor:
    """`count` evenly spaced places, with the last and, of two or more, the first; all if there are fewer."""
    last = len(places_N) - 1
    if last < count:
        return places_N
    return places_N[[last - i * last // max(count - 1, 1) for i in reversed(range(count))]]
