"""Evaluation: scoring on held-out rows, and the mixture of the agents."""

from typing import ClassVar

from pydantic.types import NonNegativeInt, PositiveFloat

from chorus.config.section import Count, MayChange, Section


class EvaluationSettings(Section):
    """Scoring on held-out rows, and the mixture of the agents."""

    TITLE: ClassVar[str] = "Evaluation"

    eval_batch_size: MayChange[Count] = 32
    """Rows of one batch on one process in evaluation."""
    eval_samples: MayChange[NonNegativeInt] = 100
    """Held-out problems scored before and after training; 0 is no evaluation."""
    max_new_tokens_eval: MayChange[Count] = 48
    """Most tokens of a generated answer."""
    dirichlet_alpha_aggregator: MayChange[PositiveFloat | None] = None
    """How the agents become one. null: the plain mean of their probabilities. A number above 0: a mixture whose weights
    are fitted to the held-out rows, under a symmetric Dirichlet prior with so many pseudo-counts an agent; large: near
    the mean."""
