"""The meter and the row of metrics.jsonl that a few steps come to."""

import math
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from metric_keys import KEYS
from torch import Tensor
from toy import toy_agents, toy_batch

from chorus.data.batches import StepBatch
from chorus.mesh import Mesh
from chorus.monitoring.metrics import LoggedMetrics, Meter
from chorus.monitoring.run_log import RunLog
from chorus.training.nonfinite import SkippedUpdates
from chorus.training.step import MicroBatchLosses, StepDone, StepResult


@dataclass(frozen=True)
class MeshOf(Mesh):
    """One of several processes: `sum_rows` adds what the others bring."""

    others: tuple[list[float], ...] = ()

    def sum_rows(self, own: Tensor) -> Tensor:
        return own + sum(torch.tensor(other, dtype=own.dtype) for other in self.others)


class EngineOf:
    """The engine of one of several processes, which hold the same agents."""

    def __init__(self, *others: list[float]) -> None:
        self.accelerator = self
        self.device = torch.device("cpu")
        self.agents = toy_agents("fused", num_agents=2)
        self.mesh = MeshOf(others=others)


def part(nll: list[float], swd: float | None) -> MicroBatchLosses:
    return MicroBatchLosses(torch.tensor(nll), None if swd is None else torch.tensor(swd))


def step_of(
    *parts: MicroBatchLosses, num_targets: int, rows: int = 1, number: int = 7, norms: Any = (1.0,)
) -> StepDone:
    """Micro-batches of so many rows of 10 tokens."""
    result = StepResult(3e-4, torch.tensor(norms), torch.tensor(0.25), lambda: 1.0)
    batch = StepBatch([toy_batch(rows=rows) for _ in parts], num_targets, rows, 0)
    return StepDone(number, 100, batch, list(parts), result)


def read(meter: Meter, engine: Any = None) -> Any:
    return meter.read(engine or EngineOf())


def test_the_means_are_those_of_steps_micro_batches_and_agents():
    meter = Meter(2, torch.device("cpu"))
    meter.add(step_of(part([6.0, 8.0], 1.0), part([9.0, 2.0], 3.0), num_targets=10), 0.5)
    meter.add(step_of(part([1.0, 3.0], 5.0), part([2.0, 4.0], 9.0), num_targets=4), 2.0)
    means = read(meter)
    assert means.task_losses == pytest.approx([(15 / 10 + 3 / 4) / 2, (10 / 10 + 7 / 4) / 2])
    assert means.swd == pytest.approx(((1 + 3) / 2 + (5 + 9) / 2) / 2)
    reward = (0.5 * (1 + 3) / 2 + 2.0 * (5 + 9) / 2) / 2  # each step's distance by its own lambda
    assert means.objective == pytest.approx(sum(means.task_losses) / 2 - reward)


def test_what_responsibilities_put_in_the_place_of_the_mean_loss_is_summed_over_processes():
    meter = Meter(2, torch.device("cpu"))
    meter.add(step_of(part([6.0, 8.0], 1.5)._replace(shared_nll=torch.tensor(5.0)), num_targets=20), 2.0)
    means = read(meter, EngineOf([0.5]))
    assert means.objective == pytest.approx(5 / 20 + 0.5 - 2.0 * 1.5)


def test_losses_and_tokens_are_summed_over_processes_and_the_distance_is_not():
    """Every process reports its own rows' losses over the step's
    targets, and the one distance between all rows."""
    meter = Meter(2, torch.device("cpu"))
    meter.add(step_of(part([6.0, 8.0], 1.5), num_targets=20), 0.0)
    means = read(meter, EngineOf([0.5, 0.25, 30.0], [0.125, 0.0, 0.0]))
    assert means.task_losses == pytest.approx([6 / 20 + 0.625, 8 / 20 + 0.25])
    assert means.swd == pytest.approx(1.5)


@pytest.mark.parametrize("sets", [1, 3], ids=["shared", "own"])
def test_the_throughput_counts_every_agents_tokens_on_every_process(
    sets: int, monkeypatch: pytest.MonkeyPatch
):
    clock = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = Meter(3, torch.device("cpu"))
    for _ in range(2):
        done = step_of(part([1.0, 1.0, 1.0], None), num_targets=5, rows=5 * sets)
        if sets > 1:  # each agent has 5 rows of its own
            [batch] = done.batch.micro_batches
            done.batch.micro_batches[0] = batch._replace(own_targets=(1, 1, 1))
        meter.add(done, 0.0)
    assert read(meter, EngineOf([0.0, 0.0, 0.0, 60.0])).agent_tokens_per_second == pytest.approx(3 * 160 / 4)


def test_a_reading_starts_again():
    meter = Meter(1, torch.device("cpu"))
    for nll, swd in ((4.0, 2.0), (1.0, None)):
        meter.add(step_of(part([nll], swd), num_targets=2), 0.0)
        means = read(meter)
        assert (means.task_losses, means.swd) == ([nll / 2], swd)


def test_a_loss_that_is_not_finite_leaves_the_other_agents_theirs_and_is_gone_from_the_next_reading():
    meter = Meter(3, torch.device("cpu"))
    meter.add(step_of(part([1.0, math.inf, 1.0], None), num_targets=2), 0.0)
    losses = read(meter, EngineOf([math.nan, 0.0, 0.5, 0.0])).task_losses
    assert [math.isfinite(loss) for loss in losses] == [False, False, True]
    assert losses[2] == 1.0
    meter.add(step_of(part([1.0, 2.0, 3.0], None), num_targets=1), 0.0)
    assert read(meter).task_losses == [1.0, 2.0, 3.0]


class Rows(RunLog):
    """Keeps the rows of every step; None where none was written."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Any] = []

    def advance(self, metrics: Any) -> None:
        self.rows.append(metrics)


def logged(steps: list[StepDone], **settings: Any) -> list[Any]:
    rows, skips, engine = Rows(), SkippedUpdates(10, 0, "runs/x"), EngineOf()
    settings = {"logging_steps": 3, "lambda_at": lambda _: 0.1, **settings}
    metrics = LoggedMetrics(rows, engine, skips, **settings)  # pyright: ignore[reportArgumentType]
    for step in steps:
        skips.after_step(step)
        metrics.after_step(step)
    return rows.rows


def test_a_row_is_written_after_the_first_step_every_so_many_and_the_last():
    steps = [step_of(part([2.0, 4.0], None), num_targets=2, number=number) for number in (1, 2, 3, 4, 100)]
    assert [row and row["step"] for row in logged(steps)] == [1, None, 3, None, 100]


@pytest.mark.parametrize("with_memory", [True, False])
def test_a_row_holds_the_objective_the_step_and_the_skipped_updates(with_memory: bool):
    steps = [
        step_of(part([2.0, 4.0], 5.0), num_targets=2, number=2, norms=[math.nan, 1.0]),
        step_of(part([2.0, 4.0], 5.0), num_targets=2, number=3, norms=[math.inf, math.nan]),
    ]
    _, row = logged(steps, with_memory=with_memory)
    assert list(row) == [*KEYS, *(["peak_memory_gib"] if with_memory else [])]
    assert row["task_loss_per_agent"] == [1.0, 2.0]
    assert (row["task_loss"], row["swd"]) == (1.5, 5.0)
    assert row["loss"] == pytest.approx(1.5 - 0.1 * 5)
    assert row["lambda_sw"] == 0.1
    assert (row["step"], row["lr"], row["grad_norm"], row["skipped"]) == (3, 3e-4, 0.25, 3)


def test_without_a_distance_the_loss_is_the_task_loss():
    [row] = logged([step_of(part([2.0, 4.0], None), num_targets=2, number=1)], lambda_at=lambda _: 0.0)
    assert row["swd"] is None
    assert row["loss"] == row["task_loss"] == pytest.approx(1.5)
