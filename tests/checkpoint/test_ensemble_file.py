"""A run is finished where its agents and its scores are there, whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from runs import config_of, run_of
from saving import state_of

from chorus.checkpoint.export import save_ensemble
from chorus.checkpoint.resume import find_start
from chorus.checkpoint.store import write_checkpoint
from chorus.config import Config

SCORES = {"before": {"base": {"nll": 1.0}}, "after": {"base": {"nll": float("nan")}}}


def finished(folder: Path, accelerator: Accelerator) -> Config:
    """A finished run of two steps in `folder`."""
    config = config_of(folder, max_train_steps=2, model_name="assets/tiny-gemma-2")
    facts = {"format": 1, "step": 2, "optimizer_step": 2, **run_of(config, accelerator)}
    write_checkpoint(folder, state_of(2.0), facts, config)
    save_ensemble(folder, state_of(2.0).weights, [0.5, 0.5], config, {"evaluation": SCORES})
    return config


def rewrite(entry: str, value: object) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        file = folder / "ensemble.json"
        content = json.loads(file.read_text())
        content[entry] = value
        file.write_text(json.dumps(content))

    return act


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def as_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


ADAPTER = "agents/agent_1/adapter_model.safetensors"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "no agents": lambda folder: shutil.rmtree(folder / "agents"),
    "an agent less": lambda folder: shutil.rmtree(folder / "agents" / "agent_1"),
    "a byte of an agent": lambda folder: flip(folder / ADAPTER),
    "an agent cut short": lambda folder: (folder / ADAPTER).write_bytes(b""),
    "an agent that is a FIFO": lambda folder: as_fifo(folder / ADAPTER),
    "no adapter_config": lambda folder: (folder / "agents/agent_0/adapter_config.json").unlink(),
    "a broken adapter_config": lambda folder: (folder / "agents/agent_0/adapter_config.json").write_text(
        '{"r": "8"}'
    ),
    "no ensemble.json": lambda folder: (folder / "ensemble.json").unlink(),
    "half of ensemble.json": lambda folder: (folder / "ensemble.json").write_text('{"evaluation": '),
    "text": lambda folder: (folder / "ensemble.json").write_text("[" * 10_000),
    "a FIFO": lambda folder: as_fifo(folder / "ensemble.json"),
    "evaluation 1": rewrite("evaluation", 1),
    "evaluation null": rewrite("evaluation", None),
    "evaluation of one side": rewrite("evaluation", {"before": {}}),
    "weights NaN": rewrite("weights", [float("nan"), 0.5]),
    "weights of another sum": rewrite("weights", [0.5, 0.9]),
    "a weight less": rewrite("weights", [1.0]),
    "agents elsewhere": rewrite("agents", ["../a", "/b"]),
}


def test_a_finished_run_is_finished_and_what_is_not_finite_is_null(tmp_path: Path, accelerator: Accelerator):
    config = finished(tmp_path, accelerator)
    assert find_start(config, run_of(config, accelerator), accelerator).is_finished
    assert json.loads((tmp_path / "ensemble.json").read_text())["evaluation"]["after"] == {
        "base": {"nll": None}
    }
    for name in (".DS_Store", "agents/agent_0/x.swp"):
        (tmp_path / name).write_text("")
    assert find_start(config, run_of(config, accelerator), accelerator).is_finished


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_without_whole_agents_and_scores_is_not_finished_and_resumes_after_its_last_step(
    damage: str, tmp_path: Path, accelerator: Accelerator
):
    config = finished(tmp_path, accelerator)
    DAMAGES[damage](tmp_path)
    start = find_start(config, run_of(config, accelerator), accelerator)
    assert (start.is_finished, start.step, start.in_place) == (False, 2, True)
    assert all("\n" not in note for note in start.notes)
    if damage != "no ensemble.json":  # as a kill before the export leaves it
        assert start.notes[0].endswith("; the agents are exported and evaluated again")
