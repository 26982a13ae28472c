"""The meter: the row of metrics.jsonl that a few steps come to."""

import math
import time
from typing import Any

import pytest
import torch
from metric_keys import KEYS
from torch import Tensor

from chorus.monitoring.metrics import Meter
from chorus.training.objective import Objective


class EngineOf:
    """The engine of one of several processes: `sum` adds what the others bring."""

    grad_norm: float | Tensor = torch.tensor(0.25)

    def __init__(self, *others: list[float]) -> None:
        self.others = others

    def sum(self, own: Tensor) -> Tensor:
        return own + sum(torch.tensor(other, dtype=own.dtype) for other in self.others)


def part(nll: list[float], swd: float | None) -> Objective:
    return Objective(torch.zeros(()), torch.tensor(nll), None if swd is None else torch.tensor(swd))


def read(meter: Meter, engine: Any = None, lambda_sw: float = 0.1, step: int = 7) -> dict[str, Any]:
    return meter.read(engine or EngineOf(), lambda_sw, step, 3e-4, skipped=2)


def test_the_means_are_those_of_steps_micro_batches_and_agents():
    meter = Meter(2, torch.device("cpu"))
    # step 1: two micro-batches with 10 targets in all; step 2: two with 4
    meter.add(part([6.0, 8.0], 1.0), num_targets=10, num_micro_batches=2, tokens=12)
    meter.add(part([9.0, 2.0], 3.0), num_targets=10, num_micro_batches=2, tokens=20)
    meter.end_step()
    meter.add(part([1.0, 3.0], 5.0), num_targets=4, num_micro_batches=2, tokens=12)
    meter.add(part([2.0, 4.0], 9.0), num_targets=4, num_micro_batches=2, tokens=16)
    meter.end_step()
    row = read(meter)
    per_agent = [(15 / 10 + 3 / 4) / 2, (10 / 10 + 7 / 4) / 2]
    swd = ((1 + 3) / 2 + (5 + 9) / 2) / 2
    assert list(row) == KEYS
    assert row["task_loss_per_agent"] == pytest.approx(per_agent)
    assert row["task_loss"] == pytest.approx(sum(per_agent) / 2)
    assert row["swd"] == pytest.approx(swd)
    assert row["loss"] == pytest.approx(sum(per_agent) / 2 - 0.1 * swd)
    assert (row["step"], row["lr"], row["grad_norm"], row["skipped"]) == (7, 3e-4, 0.25, 2)


def test_losses_and_tokens_are_summed_over_processes_and_the_distance_is_not():
    """Every process reports its own rows' losses over the step's targets, and the one distance between all rows."""
    meter = Meter(2, torch.device("cpu"))
    meter.add(part([6.0, 8.0], 1.5), num_targets=20, num_micro_batches=1, tokens=12)
    meter.end_step()
    row = read(meter, EngineOf([0.5, 0.25, 30.0], [0.125, 0.0, 0.0]))
    assert row["task_loss_per_agent"] == pytest.approx([6 / 20 + 0.625, 8 / 20 + 0.25])
    assert row["swd"] == pytest.approx(1.5)


def test_the_throughput_counts_every_agents_tokens_on_every_process(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = Meter(3, torch.device("cpu"))
    for _ in range(2):
        meter.add(part([1.0, 1.0, 1.0], None), num_targets=5, num_micro_batches=1, tokens=50)
        meter.end_step()
    assert read(meter, EngineOf([0.0, 0.0, 0.0, 60.0]))["agent_tokens_per_second"] == pytest.approx(3 * 160 / 4)


def test_without_a_distance_the_loss_is_the_task_loss():
    meter = Meter(2, torch.device("cpu"))
    meter.add(part([2.0, 4.0], None), num_targets=2, num_micro_batches=1, tokens=4)
    meter.end_step()
    row = read(meter, lambda_sw=0.0)
    assert row["swd"] is None
    assert row["loss"] == row["task_loss"] == pytest.approx(1.5)


def test_a_reading_starts_anew():
    meter = Meter(1, torch.device("cpu"))
    for nll, swd in ((4.0, 2.0), (1.0, None)):
        meter.add(part([nll], swd), num_targets=2, num_micro_batches=1, tokens=4)
        meter.end_step()
        row = read(meter)
        assert (row["task_loss"], row["swd"]) == (nll / 2, swd)


def test_a_loss_that_is_no_number_leaves_the_other_agents_theirs_and_is_gone_from_the_next_reading():
    meter = Meter(3, torch.device("cpu"))
    meter.add(part([1.0, math.inf, 1.0], None), num_targets=2, num_micro_batches=1, tokens=4)
    meter.end_step()
    losses = read(meter, EngineOf([math.nan, 0.0, 0.5, 0.0]))["task_loss_per_agent"]
    assert [math.isfinite(loss) for loss in losses] == [False, False, True]
    assert losses[2] == 1.0
    meter.add(part([1.0, 2.0, 3.0], None), num_targets=1, num_micro_batches=1, tokens=4)
    meter.end_step()
    assert read(meter)["task_loss_per_agent"] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("with_memory", [True, False])
def test_the_peak_memory_is_read_where_it_is_asked_for(with_memory: bool):
    meter = Meter(1, torch.device("cpu"), with_memory)
    meter.add(part([1.0], None), num_targets=1, num_micro_batches=1, tokens=1)
    meter.end_step()
    row = read(meter)
    assert list(row) == [*KEYS, *(["peak_memory_gib"] if with_memory else [])]
