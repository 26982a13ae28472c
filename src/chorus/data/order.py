"""Which samples each micro-batch of each process takes: a pure function of seed, step and global batch."""

from math import ceil

import torch
from torch import Tensor

from chorus.seeding import derive_seed


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool, agent: int | None = None) -> Tensor:
    """The order of the samples in an epoch, int64, every index once: for all agents, or for one."""
    if not shuffle:
        return torch.arange(num_samples)
    of_whom = () if agent is None else (agent,)
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", *of_whom, epoch))
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
