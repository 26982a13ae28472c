"""The dry run as its users start it, and each fault that it must catch, let in through a real door."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from launching import ZERO2, launch
from preloaded import forked
from safetensors.torch import load_file, save_file

import chorus.model.agents
import chorus.planning.dry_run
import chorus.planning.trial_run
from chorus.config import Config
from chorus.errors import InputError
from chorus.model.base import load_model
from chorus.planning.checks import Check, Report
from chorus.planning.dry_run import dry_run
from train import train

SMALL = ("num_agents=3", "batch_size=2", "debug_subset_size=40", "eval_samples=8", "max_seq_length=80")


def tried_in_forks(
    command: list[str], *settings: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return forked([*command, "dry_run_sanity_check.py"], "--json", *SMALL, *settings, **environment)


def checks_of(told: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in told["checks"]}


@pytest.mark.launch
def test_a_good_configuration_passes_and_leaves_nothing(tmp_path: Path):
    result = tried_in_forks([sys.executable], f"output_dir={tmp_path}/run")
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout
    told = json.loads(result.stdout)  # and nothing else there
    assert told["passed"]
    assert set(checks_of(told).values()) == {"PASS"}
    assert not list(tmp_path.iterdir())
    assert told["plan"]["rows_of_a_step"] == 2
    assert told["forecast_gib"]["peak"] > 0
    assert [run["mode"] for run in told["modes"]] == ["fused", "sequential", "parallel"]
    assert all(
        run["step_ms"] > 0 and run["peak_gib"] is None and len(run["losses"]) == 2 for run in told["modes"]
    )
    assert any(token["loss"] for token in told["sample"])


@pytest.mark.launch
def test_a_base_in_eight_bits_passes_and_its_products_say_nothing(tmp_path: Path):
    """Where a column has a large value in one row, LLM.int8 rounds it in no row of the batch."""
    pytest.importorskip("bitsandbytes")
    result = tried_in_forks([sys.executable], f"output_dir={tmp_path}/run", "load_in_8bit=true")
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout
    assert set(checks_of(json.loads(result.stdout)).values()) == {"PASS"}
    assert "MatMul8bitLt" not in result.stderr


@pytest.mark.launch
def test_two_processes_under_zero2_try_the_same_and_each_other(tmp_path: Path):
    launcher = [*ZERO2, "--num_processes", "2"]
    own = ("parallel_mode=sequential", "num_agents=4", "agent_parallel_size=2")
    result = tried_in_forks(launcher, f"output_dir={tmp_path}/run", *own)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout
    told = json.loads(result.stdout.splitlines()[-1])  # the launcher may say something of its own before
    assert set(checks_of(told).values()) == {"PASS"}
    assert {
        "processes have one configuration",
        "an all-reduce gives the right sum",
        "processes see one output_dir",
        "DeepSpeed is active",
        "each agent is equal on all its processes",
        "modes agree",
        "a checkpoint gives back the agents",
        "stock PEFT reads the agents",
    } <= checks_of(told).keys()
    assert told["plan"]["num_processes"] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.launch
def test_deepspeed_that_is_asked_for_and_not_active_is_caught(tmp_path: Path):
    result = tried_in_forks(
        [sys.executable], "use_deepspeed=true", f"output_dir={tmp_path}/run", ACCELERATE_USE_CPU="true"
    )
    assert result.returncode == 2, result.stderr[-3000:]
    (check,) = json.loads(result.stdout)["checks"]
    assert check["status"] == "FAIL"
    assert "DeepSpeed is asked for and not active" in check["found"]


def test_a_misspelt_key_is_answered_at_once_in_json_too():
    result = launch([sys.executable, "dry_run_sanity_check.py", "--json", "num_agent=3"])
    assert result.returncode == 2
    assert "did you mean 'num_agents'" in json.loads(result.stdout)["checks"][0]["found"]
    assert len(result.stderr.splitlines()) == 1


# ---- faults ----


@pytest.fixture
def tried(tmp_path: Path) -> Iterator[Any]:
    """Runs the dry run in this process; the exit code and the checks by name."""

    def run(**settings: Any) -> tuple[int, dict[str, Check]]:
        small = {"num_agents": 2, "batch_size": 2, "debug_subset_size": 20, "eval_samples": 0, "lora_rank": 2}
        report = Report(None)
        code = dry_run(Config(**{**small, "output_dir": str(tmp_path / "run"), **settings}), train, report)
        AcceleratorState._reset_state(reset_partial_state=True)
        assert not list(tmp_path.glob(".chorus-dry-run-*"))
        return code, {check.name: check for check in report.checks}

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def failed(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.status == "FAIL"]


def test_wrong_batch_arithmetic_in_the_json_is_caught_also_without_deepspeed(tried, tmp_path: Path):
    settings = json.loads(Path("ds_config_zero2.json").read_text())
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**settings, "train_batch_size": 7}))
    code, checks = tried(deepspeed_config_file=str(file))
    assert (code, failed(checks)) == (2, ["settings agree"])
    assert "'train_batch_size' is 7, but configs.yaml makes it 2" in checks["settings agree"].found
    file.write_text(json.dumps({**settings, "train_micro_batch_size_per_gpu": 4}))
    assert tried(deepspeed_config_file=str(file))[0] == 2


def test_a_cut_row_and_too_little_memory_are_caught_and_the_rest_is_tried_on_a_toy_base(
    tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chorus.planning.dry_run, "memory_limit", lambda device, fraction: 2**20)
    file = tmp_path / "rows.jsonl"
    rows = [{"question": "1 + 1?", "answer": "2"}] * 3 + [{"question": "1 + 1?", "answer": "2 " * 60}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    many = 99_991  # far more than there are rows: the run takes all of them at once
    # A JSON for eight processes does not concern this launch.
    eight = tmp_path / "eight.json"
    eight.write_text(
        json.dumps({**json.loads(Path("ds_config_zero2.json").read_text()), "train_batch_size": 8 * many})
    )
    code, checks = tried(
        dataset_name=str(file), validation_split=0.0, max_seq_length=64, batch_size=many,
        deepspeed_config_file=str(eight),
    )  # fmt: skip
    assert code == 3
    assert failed(checks) == ["no completion is cut off", "memory"]
    cut = checks["no completion is cut off"]
    assert (
        f"1 of 4 rows are longer than max_seq_length 64: the end of the completion is cut off; first {file}:4"
        in cut.found
    )
    assert cut.remedy.startswith("set max_seq_length=")
    assert "allowed (memory_fraction 0.9 of the smallest device)" in checks["memory"].found
    assert "batch_size=1 are not enough by themselves" in checks["memory"].remedy
    assert "on a toy base" in checks["fused: optimiser steps"].found
    assert f"at 8 x {many} rows" in checks["settings agree"].found


def test_a_completion_of_which_a_part_is_not_learnt_is_caught(tried, tmp_path: Path):
    """The bundled tokenizer knows "How" as one token."""
    file = tmp_path / "rows.jsonl"
    rows = [{"question": "Two<bos>", "answer": " 2"}, {"question": "Ho", "answer": "w many?"}] * 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"prompt_template": "{question}", "completion_template": "{answer}"}
    code, checks = tried(dataset_name=str(file), validation_split=0.0, **keys)
    assert (code, failed(checks)) == (3, ["all of a completion is learnt", "one beginning token a row"])
    assert checks["one beginning token a row"].found == f"not for 2 tokens of 2 rows; first {file}:1"
    check = checks["all of a completion is learnt"]
    assert check.found == f"not for 2 characters of 2 rows; first {file}:2"
    assert "begin the completion with a space" in check.remedy


def test_an_agent_that_does_not_learn_and_a_base_that_is_not_shared_are_caught(
    tried, monkeypatch: pytest.MonkeyPatch
):
    def losing_gradients(*arguments: Any, **more: Any) -> chorus.model.agents.Agents:
        agents = chorus.model.agents.build_agents(*arguments, **more)
        if 1 in agents.agents:
            agents.adapters()[1].register_hook(lambda gradient: gradient * 0)
        return agents

    monkeypatch.setattr(chorus.planning.trial_run, "build_agents", losing_gradients)
    monkeypatch.setattr(
        chorus.model.agents, "copy_sharing_storage", copy.deepcopy
    )  # of parallel mode's other agents
    code, checks = tried(parallel_mode="parallel")
    assert code == 3
    assert failed(checks) == [
        *("parallel: every agent learns", "parallel: the base is shared"),
        *("fused: every agent learns", "sequential: every agent learns", "learning changes the answers"),
    ]
    assert checks["fused: every agent learns"].found == "unmoved B: agent 1 (28 matrices)"
    assert "tensors of their own (agent 1: " in checks["parallel: the base is shared"].found


@pytest.mark.parametrize(
    ("value", "name"), [(None, "data, tokenizer and target modules"), (float("nan"), "base")]
)
def test_a_base_that_is_not_what_it_says_is_refused_in_the_words_of_the_run(
    tried, value: float | None, name: str, tmp_path: Path
):
    base = shutil.copytree("assets/tiny-gemma-2", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    broken = weights.pop("model.layers.1.mlp.down_proj.weight")
    if value is not None:
        weights["model.layers.1.mlp.down_proj.weight"] = broken.fill_(value)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as of_the_run:
        load_model(str(base), torch.float32, torch.device("cpu"))
    code, checks = tried(model_name=str(base))
    assert (code, failed(checks)) == (2, [name])
    assert checks[name].found == str(of_the_run.value)
