"""A diversity reward that drives the task loss up is said in the log, once; ordinary runs stay silent."""

import json
import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import train as script
from chorus.checkpoint.metrics_file import LossRow
from chorus.checkpoint.store import Checkpointer
from chorus.config import RunConfig
from chorus.data.batches import training_steps
from chorus.data.rows import read_rows
from chorus.model.adapters import lora_shape
from chorus.model.agents import Regularisation, build_agents
from chorus.model.base import load_model, load_tokenizer
from chorus.monitoring.ruin import RuinWatch
from chorus.monitoring.run_log import open_run_log
from chorus.training.engine import start_engine

NUM_STEPS = 24


class NoCheckpoints(Checkpointer):
    def save(self, *_: Any, **__: Any) -> None:
        pass


def run(folder: Path, **keys: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """A run of the real loop and log on the built-in task: its rows, and the warnings in its log."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = RunConfig(**{"num_agents": 2, "batch_size": 4, "logging_steps": 2, **keys})
    model = load_model(config.model_name, torch.float32, torch.device("cpu"))
    agents = build_agents("fused", model, 2, lora_shape(config), Regularisation(0, 0, 0))
    samples = read_rows(config, config.seed, load_tokenizer(config.model_name)).train
    where = {"process_index": 0, "num_processes": 1, "num_steps": NUM_STEPS, "pad_id": 1}
    where["points_per_row"] = config.swd_points_per_row
    steps = training_steps(samples, config, config, agents=agents.agents, **where)
    accelerator = Accelerator(cpu=True)
    engine, run_log = start_engine(accelerator, agents, config), open_run_log(accelerator, folder, {}, [])
    script.train(engine, steps, 0, NUM_STEPS, config, NoCheckpoints(folder, config, {}), run_log)
    run_log.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, warnings(folder)


def warnings(folder: Path) -> list[str]:
    lines = (folder / "train.log").read_text().splitlines()
    return [line for line in lines if " WARNING " in line]


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], str]:
    folder = tmp_path_factory.mktemp("ruined")
    rows, [line] = run(folder, lambda_sw=10.0)
    return folder, rows, line


def test_a_run_with_too_large_a_lambda_says_so_in_one_line_with_the_losses_the_reward_and_the_remedy(ruined):
    _, rows, line = ruined
    found = re.search(
        r"step (\d+): lambda_sw is too large: the task loss has risen from ([\d.]+) \(step (\d+)\) to "
        r"([\d.]+), while the reward lambda_sw x swd has grown from ([\d.]+) to 10 x ([\d.]+) = ([\d.]+) and "
        r"pays for it; stop this run, and start over with lambda_sw=([\d.]+) or less and "
        r"resume_from_checkpoint=null$",
        line,
    )
    assert found, line
    step, before, best_step, now, reward_before, swd, reward, remedy = map(float, found.groups())
    by_step = {row["step"]: row for row in rows}
    best = by_step[best_step]
    assert best["task_loss"] == min(row["task_loss"] for row in rows) == pytest.approx(before, rel=1e-3)
    assert by_step[step]["task_loss"] == pytest.approx(now, rel=1e-3)
    assert by_step[step]["swd"] == pytest.approx(swd, rel=1e-2)
    assert reward == pytest.approx(10 * by_step[step]["swd"], rel=1e-2)
    assert reward_before == pytest.approx(10 * best["swd"], rel=1e-2)
    assert 0.1 <= remedy <= 1
    # At once: of the rows after the best, at most the first four are silent.
    assert step - best_step <= 8


@pytest.mark.parametrize("keys", [{"lambda_sw": 0.01}, {"lambda_sw": 0.01, "lr": 0.5}])
def test_an_ordinary_run_and_one_that_diverges_by_itself_are_silent(keys: dict[str, float], tmp_path: Path):
    rows, lines = run(tmp_path, **keys)
    assert lines == []
    assert ("lr" in keys) == (max(row["task_loss"] for row in rows) > 1.3 * rows[0]["task_loss"])
    assert [row["lambda_sw"] for row in rows] == [keys["lambda_sw"]] * len(rows)


@pytest.mark.parametrize("is_after", [True, False])
def test_a_resumed_run_knows_the_rows_before_and_says_it_once(ruined, is_after: bool, tmp_path: Path):
    """Resumed after the line it does not say it again; resumed at the best row, at the same step and in the
    same words."""
    folder, rows, line = ruined
    said = int(re.search(r"step (\d+): lambda", line)[1])  # pyright: ignore[reportOptionalSubscript]
    best = min(rows, key=lambda row: row["task_loss"])["step"]
    start = said if is_after else best
    (tmp_path / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    run_log = open_run_log(Accelerator(cpu=True), tmp_path, {}, [])
    with run_log.training(NUM_STEPS, start):
        for row in rows:
            if row["step"] > start:
                run_log.advance(row)
    run_log.close()
    text = [line.split("WARNING")[1]] if not is_after else []
    assert [one.split("WARNING")[1] for one in warnings(tmp_path)] == text


# ---- the rule, on rows ----


def first_line(losses: Sequence[float], swds: Sequence[float], lambda_sw: float) -> str | None:
    watch = RuinWatch()
    rows = [
        LossRow(step=10 * number, task_loss=loss, swd=swd, lambda_sw=lambda_sw)
        for number, (loss, swd) in enumerate(zip(losses, swds, strict=True), 1)
    ]
    lines = [line for row in rows if (line := watch.look_at(row))]
    assert len(lines) <= 1
    return lines[0] if lines else None


@cache
def normal(seed: int, count: int) -> list[float]:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()


def test_ten_thousand_rows_of_noise_at_any_scale_are_silent_while_the_distance_grows():
    """Also where the best row came early, and the reward could pay for any rise."""
    growing = [0.02 * number for number in range(500)]
    for seed in range(20):
        noise = normal(seed, 500)
        for scale in (0.03, 0.3):
            falling = [0.5 + 3 * 0.97**number for number in range(500)]
            losses = [abs(loss + scale * z) for loss, z in zip(falling, noise, strict=True)]
            assert first_line(losses, growing, 1.0) is None, (seed, scale)
            assert first_line([1.0 + scale * z for z in noise], growing, 1.0) is None, (seed, scale)


def test_a_climb_in_the_same_noise_is_found_within_a_few_rows():
    for seed in range(20):
        losses = [1.0 + 0.03 * z for z in normal(seed, 50)]
        climb = accumulate([0.1] * 30, initial=0.0)
        losses[20:] = [loss + rise for loss, rise in zip(losses[20:], climb, strict=False)]
        swds = [0.0] * 20 + [2 * (1 - 0.8**number) for number in range(30)]
        line = first_line(losses, swds, 10.0)
        assert line is not None
        step = int(re.search(r"step (\d+)", line)[1])  # pyright: ignore[reportOptionalSubscript]
        assert 220 < step < 280, line


@pytest.mark.parametrize(
    ("losses", "swds", "lambda_sw", "is_ruin"),
    [
        ([5.1, 3.0, 5.2, 5.1], [0.0, 0.1, 1.9, 2.0], 10.0, True),
        ([5.1, 3.0, 5.2, 3.2, 3.1], [0.0, 0.1, 1.9, 2.0, 2.0], 10.0, False),  # one row, and back
        ([2.7, 4.0, 5.0], [0.0, 1.0, 2.0], 10.0, True),  # up from the first step on
        ([5.1, 3.0, 3.5, 3.6], [0.0, 0.1, 1.9, 2.0], 10.0, False),  # by less than a quarter
        ([5.0, 5.2, 5.4, 5.5], [0.0, 0.1, 1.9, 2.0], 10.0, False),  # the same, up from the first step on
        ([5.1, 0.1, 0.3, 0.4], [0.0, 0.1, 1.9, 2.0], 10.0, False),  # by little of what it has fallen
        ([5.1, 3.0, 5.2, 5.1], [0.0, 0.1, 1.9, 2.0], 0.1, False),  # not for the reward
        ([5.1, 3.0, 5.2, 5.1], [0.0, 1.9, 1.9, 1.9], 10.0, False),  # the reward had come before
    ],
)
def test_ruin_is_a_lasting_rise_for_which_the_reward_pays(losses, swds, lambda_sw: float, is_ruin: bool):
    assert (first_line(losses, swds, lambda_sw) is not None) == is_ruin
