"""Runs that are stopped through the real launchers and resumed: the rest is the uninterrupted run."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import PATIENCE_S, ROOT, environment, processes_of, wait_for, zero2
from preloaded import Workers, environments_once, forked, preload, train
from safetensors.torch import load_file

from chorus.checkpoint.store import checkpoints

pytestmark = pytest.mark.launch
STEPS = 16
SETTINGS = (
    *(
        "num_agents=2",
        "eval_samples=0",
        "logging_steps=1",
        "debug_subset_size=100",
        f"max_train_steps={STEPS}",
    ),
    *("save_steps=5", "save_total_limit=null", "dropconnect_p=[0.1, 0.2]", "lambda_sw=0.2"),
    *("lr=[8e-3, 4e-3]", "weight_decay=[0.01, 0.1]", "lora_alpha=[16, 8]", "lora_init_gain=[1, 2]"),
)
KINDS = {
    "plain-parallel": ([sys.executable, "train.py"], ("batch_size=4", "parallel_mode=parallel")),
    "plain-sequential": (
        [sys.executable, "train.py"],
        ("batch_size=4", "parallel_mode=sequential", "num_workers=1"),
    ),
    "zero2": (zero2(2), ("batch_size=2", "parallel_mode=fused")),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory):
    """The uninterrupted run of a kind, run once."""
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind)
            train(KINDS[kind][0], folder, *SETTINGS, *KINDS[kind][1])
            folders[kind] = folder
        return folders[kind]

    return of


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(folder)} {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "agent_tokens_per_second"} for row in rows]


def assert_bitwise(one: Path, other: Path) -> None:
    last = f"checkpoints/step_{STEPS:06d}"
    for part in ("agents", last):
        ours, theirs = tensors_of(one / part), tensors_of(other / part)
        assert len(ours) > 10
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert rows_of(one) == rows_of(other)
    assert [row["step"] for row in rows_of(one)] == list(range(1, STEPS + 1))


def stop_after_some_steps(
    command: list[str], settings: tuple[str, ...], folder: Path, number: signal.Signals
) -> tuple[int, str]:
    """Send the signal once the run has logged two steps: to the real launcher, where there is one. As Ctrl-C
    does, SIGINT goes to its whole group. Exit code, and what the run said. No process of it is left.
    """
    log = folder.parent / f"{folder.name}.log"
    if command == [sys.executable, "train.py"]:
        preload()
        process = Workers(environments_once(command), settings, log)
        signal_it = partial(os.kill, process.pids[0])
    else:
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *settings],
                cwd=ROOT,
                env=environment(CHORUS_TEST_RUN=str(folder)),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        signal_it = partial(os.killpg if number == signal.SIGINT else os.kill, process.pid)
    metrics = folder / "metrics.jsonl"
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.02)
        if not isinstance(process, Workers):
            assert len(processes_of(folder)) >= 5  # the launcher, two trainers, their data workers
        signal_it(number)
        code = process.wait(timeout=PATIENCE_S)
        wait_for(lambda: not processes_of(folder))
    finally:
        for left in processes_of(folder):
            os.kill(left, signal.SIGKILL)
    return code, log.read_text()


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("plain-parallel", signal.SIGTERM),
        pytest.param("plain-sequential", signal.SIGTERM, marks=pytest.mark.slow),
        ("zero2", signal.SIGINT),
        pytest.param("zero2", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_by_a_signal_leaves_no_process_saves_and_goes_on_bitwise(
    kind: str, number: signal.Signals, uninterrupted, tmp_path: Path
):
    command, settings = KINDS[kind]
    folder = tmp_path / "run"
    with_workers = (*settings, "num_workers=1")
    code, said = stop_after_some_steps(
        command, (*SETTINGS, *with_workers, f"output_dir={folder}"), folder, number
    )
    newest = checkpoints(folder)[0]
    step = int(newest.name[5:])
    assert 2 <= step < STEPS
    assert f"stopped and saved after step {step}" in said
    assert code == 4 or (kind == "zero2" and code != 0)  # a launcher has its own code
    assert not (folder / "agents").exists()
    with (folder / "metrics.jsonl").open(
        "a"
    ) as metrics:  # as a kill leaves it: later rows, the last one cut short
        metrics.write(json.dumps({"step": step + 1, "loss": 0.0}) + '\n{"step": ')
    train(command, folder, *SETTINGS, *settings)
    assert f"resuming from {newest}" in (folder / "train.log").read_text()
    assert_bitwise(uninterrupted(kind), folder)


@pytest.mark.parametrize(("saved", "resumed"), [("plain-parallel", "zero2"), ("zero2", "plain-sequential")])
def test_another_engine_mode_and_number_of_processes_goes_on_within_rounding(
    saved: str, resumed: str, uninterrupted, tmp_path: Path
):
    """Where they differ, AdamW makes rounding of a gradient
    near zero visible: 2e-4 in a weight, at lr 2e-3."""
    whole = uninterrupted(saved)
    command, settings = KINDS[resumed]
    start = whole / "checkpoints" / "step_000005"
    rows = train(command, tmp_path / "run", *SETTINGS, *settings, f"resume_from_checkpoint={start}")
    expected = rows_of(whole)[5:]
    assert [row["step"] for row in rows] == list(range(6, STEPS + 1))
    for row, old in zip(rows, expected, strict=True):
        assert row["lr"] == old["lr"]
        assert row["task_loss_per_agent"] == pytest.approx(old["task_loss_per_agent"], rel=2e-5)
    ours, theirs = tensors_of(tmp_path / "run" / "agents"), tensors_of(whole / "agents")
    assert all(torch.allclose(tensor, theirs[name], rtol=0, atol=2e-4) for name, tensor in ours.items())


@pytest.mark.parametrize("kind", ["plain-parallel", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_finished_run_says_so_and_another_learning_rate_is_refused(kind: str, uninterrupted):
    folder = uninterrupted(kind)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command, settings = KINDS[kind]
    again = forked(command, *SETTINGS, *settings, f"output_dir={folder}")
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"finished after {STEPS} steps" in again.stdout
    assert "resume_from_checkpoint=null" in again.stdout
    other = forked(command, *SETTINGS, *settings, f"output_dir={folder}", "lr=0.5")
    assert other.returncode == 2 or (kind == "zero2" and other.returncode != 0)  # a launcher has its own code
    assert "error: key 'lr' is 0.5, but [0.008, 0.004] in" in other.stderr
    assert f"init_adapters_from={folder}" in other.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
