"""train.py as a user runs it, in processes that are forked (preloaded.py)."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from folders import adapters
from launching import PLAIN, wait_for, zero2
from peft import PeftModel
from preloaded import Workers, environments_once, forked, preload, train
from transformers import AutoModelForCausalLM

from chorus.checkpoint.store import verify
from chorus.config import Config, load_config
from chorus.model.adapters import lora_shape
from chorus.model.agents import Regularisation, build_agents
from chorus.model.base import load_model

pytestmark = pytest.mark.launch
SMALL = (
    *("num_agents=3", "batch_size=2", "eval_samples=0", "logging_steps=1", "debug_subset_size=200"),
    "lambda_sw=0.01",
)


def test_every_agent_learns_the_default_task(tmp_path: Path):
    """A third of the default run, with few problems: a broken gradient would show in these scores."""
    settings = ("num_agents=3", "batch_size=8", "max_train_steps=50", "eval_samples=24", "ood_samples=3")
    rows = train(PLAIN, tmp_path, *settings)
    report = json.loads((tmp_path / "ensemble.json").read_text())["evaluation"]
    before, after = report["before"]["scores"], report["after"]["scores"]
    assert list(before) == ["base", "base/calibrated"]
    assert [name for name in after if "/" not in name] == [
        "base",
        *(f"agent_{k}" for k in range(3)),
        "uniform",
    ]
    assert after["base"] == before["base"]
    assert before["base"]["cls/Acc"] <= 0.05
    for name in ("agent_0", "agent_1", "agent_2", "uniform"):
        assert after[name]["cls/Acc"] > 0.4, name  # of 18 problems
        assert after[name]["token/NLL"] < before["base"]["token/NLL"] / 20, name
    assert rows[-1]["step"] == 50
    for key in (
        "loss",
        "task_loss",
        "task_loss_per_agent",
        "lr",
        "grad_norm",
        "agent_tokens_per_second",
    ):
        assert key in rows[-1]


# ---- what it writes ----


def test_zero_steps_write_initial_adapters_that_differ_and_that_stock_peft_reads_as_the_base(tmp_path: Path):
    train(PLAIN, tmp_path, *SMALL, "max_train_steps=0", "gradient_accumulation_steps=1000")
    base = AutoModelForCausalLM.from_pretrained("assets/tiny-gemma-2")
    ids = torch.arange(4, 20)[None]
    expected = base(input_ids=ids).logits
    for agent in range(3):
        loaded = PeftModel.from_pretrained(
            base, str(tmp_path / "agents" / f"agent_{agent}"), adapter_name=f"a{agent}"
        )
        loaded.set_adapter(f"a{agent}")
        assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)
    weights = adapters(tmp_path)
    name = next(key.removeprefix("agent_0 ") for key in weights if "lora_A" in key)
    initial = [weights[f"agent_{agent} {name}"] for agent in range(3)]
    assert not any(torch.equal(initial[i], initial[j]) for i in range(3) for j in range(i))
    resolved = load_config(["--config", str(tmp_path / "config.yaml")])
    assert resolved.num_agents == 3
    ensemble = json.loads((tmp_path / "ensemble.json").read_text())
    assert ensemble["weights"] == pytest.approx([1 / 3] * 3)
    # more than the rows fill, and recorded as given
    assert ensemble["config"]["gradient_accumulation_steps"] == resolved.gradient_accumulation_steps == 1000


def test_the_base_is_bit_identical_after_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In this process, so that the base can be looked at: the loop of train.py on a plain engine."""
    from transformers import AutoTokenizer

    import train as script
    from chorus.checkpoint.store import Checkpointer
    from chorus.data.batches import training_steps
    from chorus.data.rows import read_rows
    from chorus.monitoring.run_log import RunLog
    from chorus.training.engine import start_engine

    config = Config(num_agents=2, batch_size=4, lr=0.1, debug_subset_size=40, lambda_sw=0.01)
    model = load_model(config.model_name, torch.float32, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    agents = build_agents("sequential", model, 2, lora_shape(config), Regularisation(0.1, 0.1, 0))
    engine = start_engine(Accelerator(cpu=True), agents, config)
    samples = read_rows(config, config.seed, AutoTokenizer.from_pretrained(config.model_name)).train
    steps = training_steps(
        samples,
        config,
        config,
        agents=agents.agents,
        points_per_row=config.swd_points_per_row,
        pad_id=0,
        process_index=0,
        num_processes=1,
        num_steps=3,
    )
    initial = {identity: tensor.detach().clone() for identity, tensor in agents.adapter_tensors().items()}
    script.train(engine, steps, 0, 3, config, Checkpointer(tmp_path, config, {}), RunLog())
    assert all(
        not torch.equal(initial[identity], tensor) for identity, tensor in agents.adapter_tensors().items()
    )
    frozen = {name.replace(".base_layer", ""): tensor for name, tensor in agents.frozen_tensors().items()}
    compared = 0
    for name, tensor in before.items():
        if name in frozen:
            assert torch.equal(frozen[name], tensor), name
            compared += 1
    assert compared == len([name for name in before if name != "lm_head.weight"])


# ---- bad input: one line, exit code 2, nothing lost ----


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Settings and what the line must name."""
    (folder / "file").write_text("a file")
    (folder / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.3}')
    (folder / "scaled.json").write_text('{"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2}')
    (folder / "empty").mkdir()
    half = shutil.copytree("assets/tiny-gemma-2", folder / "half") / "model.safetensors"
    half.write_bytes(half.read_bytes()[:500_000])
    return {
        "unknown key": (["lrr=1"], "did you mean 'lr'"),
        "type": (["lr=fast"], "'lr'"),
        "no such data": ([f"dataset_name={folder}/missing.jsonl"], "missing.jsonl"),
        "bad row": ([f"dataset_name={folder}/bad.jsonl"], "bad.jsonl:2"),
        "no such model": ([f"model_name={folder}/model"], "does not exist"),
        "no model in it": ([f"model_name={folder}/empty"], "config.json"),
        "half a model": ([f"model_name={folder}/half"], "model.safetensors is incomplete or damaged"),
        "no such layer": (["lora_target_modules=[q_projj]", "max_train_steps=0"], "q_projj"),
        "output is no run's": ([f"output_dir={folder}"], "is not the folder of a run"),
        "output is a file": ([f"output_dir={folder}/file/run"], "is a file"),
        "json": (
            ["use_deepspeed=true", f"deepspeed_config_file={folder}/ds.json"],
            "gradient_clipping",
        ),
        "json that only DeepSpeed's engine refuses": (
            ["use_deepspeed=true", f"deepspeed_config_file={folder}/scaled.json"],
            "DeepSpeed refuses its JSON: gradient_predivide_factor != 1.0",
        ),
        "fp16 without a gpu": (["mixed_precision=fp16"], "fp16"),
    }


def test_bad_input_gives_one_line_that_names_it_and_exit_code_2_and_loses_nothing(tmp_path: Path):
    kept = tmp_path / "kept"
    (kept / "agents").mkdir(parents=True)
    (kept / "agents" / "precious").write_text("adapter")
    (kept / "metrics.jsonl").touch()
    for case, (settings, named) in bad_inputs(tmp_path).items():
        output = (
            [] if any(setting.startswith("output_dir") for setting in settings) else [f"output_dir={kept}"]
        )
        result = forked([sys.executable, "train.py"], *settings, *output)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2, (case, result.stderr[-2000:])
        assert "Traceback" not in result.stderr, (case, result.stderr[-2000:])
        assert len(lines) == 1, (case, result.stderr)
        assert named in lines[0], (case, lines)
        assert any(path.read_text() == "adapter" for path in tmp_path.glob("kept*/agents/precious")), case


def test_a_launcher_that_contradicts_configs_yaml_is_refused():
    result = forked(zero2(1), "use_deepspeed=false", "output_dir=/nonexistent/run")
    assert result.returncode != 0
    assert "error: key 'use_deepspeed' is false, but the launcher starts DeepSpeed" in result.stderr


def test_non_finite_losses_are_skipped_and_then_end_the_run_with_agents_step_and_a_whole_checkpoint(
    tmp_path: Path,
):
    run = tmp_path / "run"
    settings = (*SMALL, "lr=1e30", "num_warmup_steps_ratio=0", "max_grad_norm=0", "max_skipped_steps=2")
    result = forked([sys.executable, "train.py"], *settings, f"output_dir={run}")
    assert result.returncode == 3, result.stderr[-2000:]
    line = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert "agents 0, 1, 2: loss or gradient is not finite at step 4" in line
    assert f"{run}/checkpoints/step_000004 holds" in line
    assert [f"at step {step} " in (run / "train.log").read_text() for step in range(1, 5)] == [
        False,
        True,
        True,
        True,
    ]
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 3, 3, 3]
    assert rows[-1]["task_loss_per_agent"] == [None] * 3
    saved = verify(run / "checkpoints" / "step_000004")
    assert (saved.optimizer_step, saved.skips_in_a_row) == (1, 3)
    assert not (run / "agents").exists()


def rows_of(folder: Path) -> int:
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def test_a_second_run_in_the_folder_of_one_at_work_is_refused_and_the_first_goes_on(tmp_path: Path):
    command = [sys.executable, "train.py"]
    settings = (*SMALL, "max_train_steps=100000", f"output_dir={tmp_path}/run", "save_steps=1")
    preload()
    first = Workers(environments_once(command), settings, tmp_path / "log")
    try:
        wait_for(lambda: rows_of(tmp_path) > 2)
        for how in ("auto", "null"):
            again = forked(command, *settings, f"resume_from_checkpoint={how}")
            assert again.returncode == 2
            assert f"error: key 'output_dir': {tmp_path}/run: another run is using it" in again.stderr
        rows = rows_of(tmp_path)
        wait_for(lambda: rows_of(tmp_path) > rows)
    finally:
        first.kill()
