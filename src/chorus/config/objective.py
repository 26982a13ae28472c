"""Objective: the agents' losses, and the diversity term beside them."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic.types import NonNegativeFloat

from chorus.config.section import Count, Probability, Section

Representation = Literal["tokens", "mean", "last"]
Space = Literal["hidden", "probabilities"]
Share = Annotated[float, Field(ge=0, le=1)]


class ObjectiveSettings(Section):
    """The agents' losses, and the diversity term beside them."""

    TITLE: ClassVar[str] = "Objective"

    lambda_sw: NonNegativeFloat = 0.0
    """Weight of the diversity reward, the squared sliced 2-Wasserstein distance between the agents. Above 0
    it needs num_agents of at least 2. 0, the default, turns it off at no cost: of four tasks it gained on one
    and cost on one (docs/quality.md)."""
    lambda_sw_warmup_ratio: Share = 0.0
    """Fraction of all optimiser steps, from 0 to 1, in which the weight rises to lambda_sw in a line; 0: it
    is lambda_sw from the first step on."""
    lambda_sw_decay_ratio: Share = 0.0
    """Fraction of all optimiser steps, the last ones, in which the weight falls from lambda_sw towards 0 in a
    line; 0: it stays lambda_sw. With lambda_sw_warmup_ratio at most 1."""
    swd_space: Space = "hidden"
    """What of the agents is compared. hidden: their last hidden states, scaled to one length. probabilities:
    their predicted distributions of the next token, by one more product with the head for each point."""
    swd_num_projections: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Random directions onto which the sliced distance projects, new at every optimiser step."""
    swd_representation: Representation = "tokens"
    """The points that are compared. tokens: target tokens, each a point; mean: the mean of a row's target
    tokens; last: a row's last target token."""
    swd_points_per_row: Count = 16
    """With swd_representation tokens, and in swd_space probabilities also with mean: at most so many target
    tokens of each row, evenly spaced."""
    responsibility_alpha: Share = 1.0
    """How the agents share the task. 1: each learns every row, the mean of the agents' own losses. 0: the
    loss of their mixture, in which a row is learnt by the agents that know it best. Between: a row counts for
    agent k in proportion to exp(-(1 - responsibility_alpha) x loss), with k's loss on the row's tokens,
    summed."""
    responsibility_floor: Probability = 0.1
    """With responsibility_alpha below 1: the fraction of every row's weight that is spread evenly, from 0 to
    below 1, so that no agent is left without anything to learn."""

    @field_validator("lambda_sw")
    @classmethod
    def _has_agents_to_compare(cls, lambda_sw: float, info: ValidationInfo) -> float:
        if lambda_sw > 0 and info.data.get("num_agents") == 1:
            raise ValueError(
                "a distance between agents needs two of them, and num_agents is 1; set lambda_sw to 0"
            )
        return lambda_sw

    @field_validator("lambda_sw_decay_ratio")
    @classmethod
    def _falls_after_it_has_risen(cls, decay: float, info: ValidationInfo) -> float:
        warmup = info.data.get("lambda_sw_warmup_ratio", 0.0)
        if decay + warmup > 1:
            raise ValueError(
                f"with lambda_sw_warmup_ratio {warmup:g} it is above 1; lower one of them, so that the "
                "weight has risen before it falls"
            )
        return decay
