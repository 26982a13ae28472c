"""What is said of memory before the base is loaded, and when it runs out."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rows import data_config, read_rows, write_lines

from chorus.config import RunConfig
from chorus.data.batches import Sample
from chorus.data.cache import TokenTable
from chorus.ensemble.scoring import token_log_probs
from chorus.errors import InputError, OutOfMemory, RunError
from chorus.planning import memory_check
from chorus.planning.forecast import Machine
from chorus.planning.memory_check import foresee_memory, longest_of, memory_errors_named
from chorus.planning.memory_forecast import forecast

SMALL: dict[str, Any] = {"num_agents": 2, "batch_size": 8, "eval_samples": 0, "max_seq_length": 64}
SMALL["output_dir"] = "runs/no run of this name"  # a remedy depends on checkpoints that are there
CPU = Machine("cpu")
ROWS = [
    Sample(torch.zeros(length, dtype=torch.int64), torch.ones(length).bool()) for length in [40, 64, 10] * 30
]


def limited(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """As on a device on which so much is free."""
    monkeypatch.setattr(memory_check, "memory_limit", lambda device, fraction: limit)


def test_what_fits_is_said_in_one_line_with_what_is_free(accelerator: Accelerator):
    level, line = foresee_memory(RunConfig(**SMALL), "no", accelerator, ROWS)
    assert level == logging.INFO
    assert line.startswith("memory: by forecast training needs ")
    assert "are free" in line
    assert "\n" not in line


def test_the_longest_row_is_told_without_reading_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A million rows would be a gigabyte in every process, and seconds at every start."""
    lines = [{"question": "a " * count, "answer": "b"} for count in (3, 40, 90)]
    config = data_config(write_lines(tmp_path / "rows.jsonl", lines), max_seq_length=64)
    rows, run = read_rows(config).train, RunConfig(**config.model_dump() | SMALL)
    longest = max(len(row.ids) for row in rows)
    monkeypatch.setattr(TokenTable, "tokens", None)
    assert longest_of(run, rows, []) == longest - 1
    assert longest_of(run, rows[:0], []) == longest_of(run, rows, ROWS) == 63


def test_what_does_not_fit_is_refused_with_settings_that_do(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    config = RunConfig(**SMALL | {"batch_size": 64})
    limited(
        monkeypatch, forecast(config, "no", CPU).peak - 100 * 2**20
    )  # more than this process grows meanwhile
    with pytest.raises(InputError, match=r"it does not fit; gradient_checkpointing=selective needs .* GiB "):
        foresee_memory(config, "no", accelerator, ROWS)
    level, line = foresee_memory(config.model_copy(update={"memory_check": "warn"}), "no", accelerator, ROWS)
    assert level == logging.WARNING
    assert "it may not fit; gradient_checkpointing=selective needs " in line
    monkeypatch.setattr(memory_check, "forecast", None)
    assert foresee_memory(config.model_copy(update={"memory_check": "off"}), "no", accelerator, ROWS) == (
        0,
        "",
    )


def test_the_fullest_device_of_all_processes_decides(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    """As beside a second process, on whose device another program has left 1 MiB."""
    monkeypatch.setattr(memory_check, "gather_object", lambda own: [*own, 2**20])
    with pytest.raises(InputError, match=r"and 1\.0 MiB are free: it does not fit; "):
        foresee_memory(RunConfig(**SMALL), "no", accelerator, ROWS[:3])


# ---- it has run out ----


class Greedy:
    """Agents that ask for more than any host has."""

    def __getattr__(self, name: str) -> Any:
        return torch.empty(2**60)


def test_the_line_names_what_was_asked_for_the_phase_and_what_would_help():
    with pytest.raises(OutOfMemory) as in_training, memory_errors_named(RunConfig(**SMALL)):
        torch.empty(2**60)
    assert "out of memory in training, at " in str(in_training.value)
    assert (
        "4294967296.00 GiB asked for; set gradient_checkpointing=full, or parallel_mode=sequential, or "
        "batch_size=4 " in (str(in_training.value))
    )
    agents: Any = Greedy()
    with (
        pytest.raises(OutOfMemory) as in_evaluation,
        memory_errors_named(RunConfig(**SMALL | {"eval_batch_size": 16})),
    ):
        token_log_probs(agents, [None], ROWS)
    assert "out of memory in evaluation, at " in str(in_evaluation.value)
    assert "; set eval_batch_size=4 or lower max_new_tokens_eval or leave it out with eval_samples=0; " in (
        str(in_evaluation.value)
    )
    assert "\n" not in str(in_training.value) + str(in_evaluation.value)


def test_what_is_set_already_is_no_remedy():
    lean = RunConfig(
        **SMALL | {"gradient_checkpointing": "full", "parallel_mode": "sequential", "batch_size": 1}
    )
    with (
        pytest.raises(OutOfMemory, match=r"; take a smaller max_seq_length, base"),
        memory_errors_named(lean),
    ):
        torch.empty(2**60)


@pytest.mark.parametrize(
    "error", [RunError("agent 1"), InputError("key 'lr'"), RuntimeError("ours"), ValueError("ours")]
)
def test_other_errors_pass_as_they_are(error: Exception):
    with pytest.raises(type(error)) as raised, memory_errors_named(RunConfig(**SMALL)):
        raise error
    assert raised.value is error
