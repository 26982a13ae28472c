"""The learning rate and lambda as functions of the optimiser step: no state to save, the same for any number
of processes."""

from collections.abc import Callable

import torch
from transformers import get_scheduler

from chorus.config.per_agent import NumberOrList


def learning_rate(
    name: str, lr: NumberOrList, num_steps: int, warmup_ratio: float
) -> Callable[[int], NumberOrList]:
    """lr(step) of the step'th optimiser step, counted from 0, by transformers' formula for the schedule
    `name`. As `lr` is: a number, or one for each agent, all in proportion.

    Accelerate's wrapped scheduler steps once per process, so it runs N times too fast on N processes; a
    scheduler also has state. transformers' formulas are inside schedulers, so one is created for a dummy
    parameter and its multiplier is used.

    Args:
        num_steps: optimiser steps of the whole run, over which it decays.
        warmup_ratio: the fraction of them in which the rate rises linearly from 0; rounded up.
    """
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup_steps = _rounded_up(num_steps * warmup_ratio)
    scheduler = get_scheduler(name, unused, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
    (multiplier,) = scheduler.lr_lambdas  # pyright: ignore[reportAttributeAccessIssue]

    def at(step: int) -> NumberOrList:
        if isinstance(lr, float | int):
            return lr * multiplier(step)
        return [own * multiplier(step) for own in lr]

    return at


def diversity_weight(
    lambda_sw: float, num_steps: int, warmup_ratio: float, decay_ratio: float
) -> Callable[[int], float]:
    """lambda(step) of the step'th optimiser step, counted from 0: a line up, `lambda_sw`, and a line down.

    Of W warm-up steps the n'th has n / W of it, and of D decay steps, the run's last ones, that with n steps
    to go, itself included, n / D. So it is never 0, and the distance is measured at every step.

    Args:
        num_steps: optimiser steps of the whole run.
        warmup_ratio, decay_ratio: fractions of them; rounded up.
    """
    warmup_steps, decay_steps = (_rounded_up(num_steps * ratio) for ratio in (warmup_ratio, decay_ratio))

    def at(step: int) -> float:
        rise = (step + 1) / max(warmup_steps, 1)
        fall = (num_steps - step) / max(decay_steps, 1)
        return lambda_sw * min(1.0, rise, fall)

    return at


def _rounded_up(steps: float) -> int:
    return -int(-steps // 1)
