import math
import random
from typing import get_args

import numpy
import pytest
import torch
from transformers import get_scheduler

from chorus.config import Config
from chorus.training.schedule import diversity_weight, learning_rate

NAMES = get_args(Config.model_fields["lr_scheduler_type"].annotation)
EVERY_NAME = pytest.mark.parametrize("name", NAMES)
LR = 3e-4


def stepped(name: str, num_steps: int, warmup_steps: int) -> list[float]:
    """The rate of every step as an ordinary loop sees it:
    transformers' scheduler, stepped after the optimizer."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=num_steps)
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@EVERY_NAME
@pytest.mark.parametrize(("num_steps", "ratio"), [(20, 0.0), (20, 0.25), (23, 0.1), (7, 1.0), (1, 0.05)])
def test_every_step_has_the_rate_of_transformers_own_scheduler(name: str, num_steps: int, ratio: float):
    lr_at = learning_rate(name, LR, num_steps, ratio)
    expected = stepped(name, num_steps, math.ceil(num_steps * ratio))
    assert [lr_at(step) for step in range(num_steps)] == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "constant"])
def test_warm_up_rises_in_a_line_from_zero_to_the_peak(name: str):
    lr_at = learning_rate(name, LR, num_steps=101, warmup_ratio=0.0991)  # 10.01 steps, so 11
    assert [lr_at(step) for step in range(12)] == pytest.approx([LR * step / 11 for step in range(12)])


def test_a_linear_schedule_without_warm_up_starts_at_the_peak_and_falls_in_a_line_towards_zero():
    lr_at = learning_rate("linear", LR, num_steps=5, warmup_ratio=0.0)
    assert [lr_at(step) for step in range(6)] == pytest.approx([LR * left / 5 for left in (5, 4, 3, 2, 1, 0)])


@EVERY_NAME
def test_the_rate_depends_on_the_step_alone(name: str):
    """Asked in any order, twice, or by another instance: a resumed run needs no state."""
    lr_at, other = (learning_rate(name, LR, 30, 0.2) for _ in range(2))
    expected = [lr_at(step) for step in range(30)]
    order = list(range(30)) * 2
    random.Random(0).shuffle(order)
    assert [other(step) for step in order] == [expected[step] for step in order]


@EVERY_NAME
def test_a_run_of_no_steps_has_a_schedule(name: str):
    assert math.isfinite(learning_rate(name, LR, 0, 0.05)(0))


# ---- lambda ----


@pytest.mark.parametrize("num_steps", [1, 7, 40])
@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (0.25, 0.0), (0.0, 0.3), (0.25, 0.5), (1.0, 0.0)])
def test_lambda_is_the_line_up_the_plateau_and_the_line_down_of_numpy(
    num_steps: int, warmup: float, decay: float
):
    rise, fall = math.ceil(num_steps * warmup), math.ceil(num_steps * decay)
    # Corners of the trapezoid; a step's place is its end on the way up, and its beginning on the way down.
    up = numpy.interp(numpy.arange(1, num_steps + 1), [0, rise], [0, 2.5]) if rise else 2.5
    down = numpy.interp(numpy.arange(num_steps), [num_steps - fall, num_steps], [2.5, 0]) if fall else 2.5
    lambda_at = diversity_weight(2.5, num_steps, warmup, decay)
    found = [lambda_at(step) for step in range(num_steps)]
    assert found == pytest.approx((numpy.ones(num_steps) * numpy.minimum(up, down)).tolist(), rel=1e-12)
    assert min(found) > 0
    if rise + fall <= num_steps:
        assert max(found) == 2.5
    if not (warmup or decay):
        assert found == [2.5] * num_steps, "to the bit"


def test_lambda_0_stays_0_under_a_schedule():
    assert {diversity_weight(0.0, 10, 0.5, 0.5)(step) for step in range(10)} == {0.0}
