"""Training: steps, optimizer and schedule."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat

from chorus.config.per_agent import PerAgent
from chorus.config.section import MOST_STEPS, ComparedByEffect, Count, MayChange, Section


class TrainingSettings(Section):
    """Steps, optimizer and schedule."""

    TITLE: ClassVar[str] = "Training"

    epochs: ComparedByEffect[Annotated[int, Field(ge=1, le=10**6)]] = 3
    """Passes over the training rows, where max_train_steps is null."""
    max_train_steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] | None = 100
    """Optimiser steps: training stops there, and epochs repeat as needed to reach it. null: as many as epochs
    give; 0 trains nothing and writes the initial adapters."""
    batch_size: ComparedByEffect[Count] = 16
    """Rows of one micro-batch on one process; every agent sees all of them, or with per_agent_batches as many
    of its own."""
    gradient_accumulation_steps: ComparedByEffect[Count] = 1
    """Micro-batches of one optimiser step."""
    lr: PerAgent[PositiveFloat] = 8e-3
    """AdamW's learning rate, at the schedule's peak. A number, or a list with one for each agent; all follow
    the same schedule."""
    weight_decay: PerAgent[NonNegativeFloat] = 0.01
    """AdamW's decoupled weight decay; 0 is off. A number, or a list with one for each agent."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "linear"
    """linear, cosine, cosine_with_restarts, constant,
    constant_with_warmup or inverse_sqrt, as in transformers."""
    num_warmup_steps_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Fraction of all optimiser steps, from 0 to 1, in which the learning rate rises from 0."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip gradients to this norm, one norm over all agents; 0 is off."""
    max_skipped_steps: MayChange[NonNegativeInt] = 10
    """An agent with a non-finite loss or gradient skips its update, with a warning; the others step normally.
    After more than this many optimiser steps in a row with a skipped update, the run saves and ends; 0: after
    the first.
    """
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Every random number of the run comes from this one, from 0 to below 2**63."""
