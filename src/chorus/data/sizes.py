"""Sizes that a configuration asks for and that its rows do not fill."""

import logging
from math import ceil
from typing import TypeVar

from chorus.config import Config
from chorus.data.samples import Samples

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Config)


def no_larger_than_the_rows(config: C, samples: Samples, num_processes: int) -> C:
    """The configuration without room for rows and tokens that never come. Every step has the same rows.

    Layouts, and the points of the distance, make room for whole batches. A batch_size, an accumulation or
    swd_points_per_row far above what the rows have would fill the memory with padding, or time with passes
    through it.

    Args:
        samples: all training rows, so that every process decides alike.
        num_processes: that have different rows.
    """
    batch_size = min(config.batch_size, len(samples))
    longest = min(int(samples.lengths.max(initial=2)), config.max_seq_length)
    most = {
        "batch_size": batch_size,
        "gradient_accumulation_steps": ceil(len(samples) / (batch_size * num_processes)),
        "swd_points_per_row": max(longest - 1, 1),
    }
    smaller = {key: value for key, value in most.items() if value < getattr(config, key)}
    for key, value in smaller.items():
        logger.info("%s: %d does no more than %d with these rows", key, getattr(config, key), value)
    return config.model_copy(update=smaller)
