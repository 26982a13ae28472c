"""Evaluation: scoring on held-out rows, the mixture of the agents, and what a run does with its scores."""

from typing import ClassVar, Literal

from pydantic.types import NonNegativeInt, PositiveFloat

from chorus.config.section import Count, MayChange, Place, Probability, Section, Text


class EvaluationSettings(Section):
    """Scoring on held-out rows, and the mixture of the agents."""

    TITLE: ClassVar[str] = "Evaluation"

    eval_batch_size: MayChange[Count] = 64
    """Problems that one process answers at a time in evaluation, by all answerers together."""
    eval_samples: MayChange[NonNegativeInt] = 200
    """Held-out problems of an evaluation, those for calibration among them; 0 is no evaluation."""
    calibration_split: MayChange[Probability] = 0.25
    """Fraction of these problems to which temperatures and the mixture's weights are fitted, and which are
    not scored: a choice by the seed. 0: nothing is fitted."""
    max_new_tokens_eval: MayChange[Count] = 48
    """Most tokens of a generated answer."""
    eval_choices: MayChange[Literal["auto"] | bool] = "auto"
    """true: the different answers of the held-out rows are the choices of every question, and the most
    probable one is taken. false: answers are written. auto: choices where there are at most 32, each for five
    rows on average."""
    dirichlet_alpha_aggregator: MayChange[PositiveFloat | None] = None
    """How the agents become one. null: the plain mean of their probabilities. A number above 0: a mixture
    whose weights are fitted to the calibration rows, under a symmetric Dirichlet prior with so many
    pseudo-counts an agent; large: near the mean."""
    mixture_observations: MayChange[Literal["sequence", "token"]] = "sequence"
    """What the weights are fitted to. sequence: whole answers, each one observation. token: tokens, which are
    not independent within an answer, so that the weights become extreme sooner."""
    ood_dataset_name: MayChange[Place | None] = "auto"
    """A second data set, in any form that dataset_name takes, whose problems uncertainty should tell from the
    held-out ones. auto: arithmetic_harder beside the built-in arithmetic_hard, otherwise none. null: none."""
    ood_samples: MayChange[Count] = 40
    """Problems of that second data set."""
    eval_on_start: MayChange[bool] = True
    """Score before the first step, too. Adapters that add nothing yet leave the base alone to be scored."""
    eval_steps: MayChange[NonNegativeInt] = 0
    """Score every N optimiser steps; 0: only before and after training."""
    metric_for_best_model: MayChange[Text | None] = None
    """The score that names the best step, as metrics.jsonl spells it: uniform/cls/Acc, agent_0/token/NLL. Its
    checkpoint is kept beside the newest ones. null: no step is the best one."""
    early_stopping_patience: MayChange[NonNegativeInt] = 0
    """Stop training after this many evaluations in a row without a better metric_for_best_model; 0: never."""
    load_best_model_at_end: MayChange[bool] = False
    """true: export and score the agents of the best step, in place of those of the last one."""
