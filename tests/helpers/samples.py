"""Samples and steps of small made-up rows."""

import random
from collections.abc import Iterator, Sequence

import torch

from chorus.config import Config
from chorus.data.batches import Sample, StepBatch
from chorus.data.batches import training_steps as real_training_steps

PAD = 0


def make_samples(count: int, longest: int = 12) -> list[Sample]:
    """Rows of different lengths, each with its own token id, so that a token tells its row."""
    draw = random.Random(count)
    samples = []
    for row in range(count):
        length = draw.randint(2, longest)
        is_target = torch.tensor([draw.random() < 0.5 for _ in range(length - 1)] + [True])
        samples.append(Sample(torch.full((length,), 100 + row), is_target))
    return samples


def config(**keys: object) -> Config:
    return Config.model_validate({"swd_points_per_row": 3, **keys})


def training_steps(
    samples: list[Sample],
    *,
    num_steps: int,
    start_step: int = 0,
    process: int = 0,
    processes: int = 1,
    agents: Sequence[int] = (0,),
    **keys: object,
) -> Iterator[StepBatch]:
    place = {
        "agents": agents,
        "process_index": process,
        "num_processes": processes,
        "num_steps": num_steps,
        "start_step": start_step,
    }
    settings = config(**keys)
    points_per_row = settings.swd_points_per_row
    return real_training_steps(
        samples, settings, settings, points_per_row=points_per_row, pad_id=PAD, **place
    )
