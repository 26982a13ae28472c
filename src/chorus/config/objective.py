"""Objective: the diversity term beside the cross-entropy."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic.types import NonNegativeFloat

from chorus.config.section import Count, Section

Representation = Literal["tokens", "mean", "last"]


class ObjectiveSettings(Section):
    """The diversity term beside the cross-entropy."""

    TITLE: ClassVar[str] = "Objective"

    lambda_sw: NonNegativeFloat = 0.01
    """Weight of the diversity reward, the squared sliced 2-Wasserstein distance between the agents' hidden
    states. Above 0 it needs num_agents of at least 2; 0 turns it off at no cost."""
    swd_num_projections: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Random directions onto which the sliced distance projects, new at every optimiser step."""
    swd_representation: Representation = "tokens"
    """The points that are compared. tokens: target tokens, each a point; mean: the mean of a row's target
    tokens; last: a row's last target token."""
    swd_points_per_row: Count = 16
    """With swd_representation tokens: at most so many target tokens of each row, evenly spaced."""

    @field_validator("lambda_sw")
    @classmethod
    def _has_agents_to_compare(cls, lambda_sw: float, info: ValidationInfo) -> float:
        if lambda_sw > 0 and info.data.get("num_agents") == 1:
            raise ValueError(
                "a distance between agents needs two of them, and num_agents is 1; set lambda_sw to 0"
            )
        return lambda_sw
