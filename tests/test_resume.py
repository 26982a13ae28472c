"""Where a run begins: what may differ from the checkpoint, what may not, and that the rest is the uninterrupted run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from launching import ROOT, environment, launch, train, zero2
from safetensors.torch import load_file
from test_checkpoint import state_of
from toy import tiny_gemma
from transformers import AutoTokenizer

from chorus.checkpoint import checkpoints, write_checkpoint
from chorus.config import Config
from chorus.errors import InputError
from chorus.resume import (
    COMPARED_BY_EFFECT,
    MAY_CHANGE,
    base_fingerprint,
    data_fingerprint,
    describe_run,
    find_start,
    refuse_another_base,
)
from chorus.rows import Problem

ROWS = [Problem("1 + 1 =", " 2"), Problem("2 + 2 =", " 4")]
MUST_EQUAL = [
    *("num_agents", "lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "initialize_adapters_rand"),
    *("dropconnect_p", "lambda_sw", "swd_num_projections", "swd_representation", "swd_points_per_row"),
    *("prompt_template", "completion_template", "max_seq_length", "validation_split", "shuffle", "max_train_steps"),
    *("lr", "weight_decay", "lr_scheduler_type", "num_warmup_steps_ratio", "max_grad_norm", "seed"),
]


def run_of(config: Config, accelerator: Accelerator, rows: list[Problem] = ROWS, **more: Any) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny-gemma-2")
    return {**describe_run(config, rows, tokenizer, "no", accelerator), "num_steps": 4, **more}


def save_run(config: Config, accelerator: Accelerator, step: int) -> Path:
    facts = {"format": 1, "step": step, "optimizer_step": step, **run_of(config, accelerator)}
    return write_checkpoint(Path(config.output_dir), state_of(float(step)), facts, config)


def config_of(folder: Path, **more: Any) -> Config:
    return Config(**{"output_dir": str(folder), "save_total_limit": None, **more})


# ---- which checkpoint ----


def test_without_a_checkpoint_or_with_null_a_run_begins_anew(tmp_path: Path, accelerator: Accelerator):
    config = config_of(tmp_path)
    assert find_start(config, run_of(config, accelerator), accelerator).folder is None
    save_run(config, accelerator, 2)
    config = config_of(tmp_path, resume_from_checkpoint=None)
    begin = find_start(config, run_of(config, accelerator), accelerator)
    assert (begin.folder, begin.step, begin.in_place) == (None, 0, False)


def test_auto_takes_the_newest_whole_one_and_names_the_damaged_file(tmp_path: Path, accelerator: Accelerator):
    config = config_of(tmp_path)
    folders = [save_run(config, accelerator, step) for step in (1, 2, 3)]
    (folders[2] / "optimizer.safetensors").write_bytes(b"")
    begin = find_start(config, run_of(config, accelerator), accelerator)
    assert (begin.folder, begin.step, begin.in_place, begin.is_finished) == (folders[1], 2, True, False)
    (note,) = begin.notes
    assert note.startswith(f"{folders[2]}/optimizer.safetensors: ")
    for folder in folders[:2]:
        (folder / "MANIFEST.json").unlink()
    begin = find_start(config, run_of(config, accelerator), accelerator)
    assert begin.folder is None
    assert len(begin.notes) == 3


def test_a_named_checkpoint_that_is_damaged_or_none_is_an_error(tmp_path: Path, accelerator: Accelerator):
    config = config_of(tmp_path)
    folder = save_run(config, accelerator, 1)
    named = config_of(tmp_path, resume_from_checkpoint=str(folder))
    assert find_start(named, run_of(named, accelerator), accelerator).folder == folder
    (folder / "state.json").write_text("{}")
    with pytest.raises(InputError, match=rf"^{folder}/state.json: .*; name another"):
        find_start(named, run_of(named, accelerator), accelerator)
    for other in (tmp_path, tmp_path / "nothing", tmp_path / ("x" * 300)):
        config = config_of(tmp_path, resume_from_checkpoint=str(other))
        with pytest.raises(InputError, match=r"'resume_from_checkpoint': .* is no checkpoint; name a folder such as"):
            find_start(config, run_of(config, accelerator), accelerator)


def test_a_checkpoint_of_another_folder_is_not_gone_on_with_in_place(tmp_path: Path, accelerator: Accelerator):
    folder = save_run(config_of(tmp_path / "one"), accelerator, 1)
    config = config_of(tmp_path / "two", resume_from_checkpoint=str(folder))
    assert not find_start(config, run_of(config, accelerator), accelerator).in_place


# ---- what may change ----


def test_every_key_is_classed():
    """A new key is refused to change until someone has decided, here and in resume.py."""
    assert sorted([*MUST_EQUAL, *MAY_CHANGE, *COMPARED_BY_EFFECT]) == sorted(Config.model_fields)


OTHER_VALUES = {
    **{"lora_target_modules": ["q_proj"], "swd_representation": "mean", "prompt_template": "Q: {question}"},
    **{"completion_template": "{answer}", "lr_scheduler_type": "cosine", "parallel_mode": "sequential"},
    **{"attn_implementation": "eager", "use_deepspeed": False, "deepspeed_config_file": None},
    **{"dirichlet_alpha_aggregator": 2.0, "save_total_limit": 7, "agents_per_pass": 1},
    **{"compile": False, "cuda_graphs": False, "gradient_checkpointing": "selective"},
    **{"use_gradient_checkpointing": None},
}


def other_value(key: str) -> Any:
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    value = getattr(Config(), key)
    if isinstance(value, bool):
        return not value
    return value / 2 + 0.25 if isinstance(value, float) else value + 1


@pytest.mark.parametrize("key", MUST_EQUAL)
def test_a_key_that_makes_another_run_is_refused_with_both_values(key: str, tmp_path: Path, accelerator: Accelerator):
    old = config_of(tmp_path)
    folder = save_run(old, accelerator, 1)
    config = old.model_copy(update={key: other_value(key)})
    with pytest.raises(InputError) as caught:
        find_start(config, run_of(config, accelerator), accelerator)
    line = str(caught.value)
    assert line.startswith(f"key '{key}' is {getattr(config, key)}, but {getattr(old, key)} in {folder}; "), line
    assert "resume_from_checkpoint=null" in line


def test_keys_that_say_how_a_run_is_carried_out_may_change(tmp_path: Path, accelerator: Accelerator):
    old = config_of(tmp_path)
    folder = save_run(old, accelerator, 1)
    keys = MAY_CHANGE - {"output_dir", "resume_from_checkpoint"}
    config = old.model_copy(update={key: other_value(key) for key in keys})
    assert find_start(config, run_of(config, accelerator), accelerator).folder == folder


@pytest.mark.parametrize(
    ("settings", "more", "expected"),
    [
        ({"batch_size": 8, "lambda_sw": 0.01}, {"world_size": 2}, None),
        (
            {"batch_size": 4, "gradient_accumulation_steps": 4, "lambda_sw": 0.01},
            {},
            "key 'batch_size' x processes is 4",
        ),
        ({"batch_size": 8, "lambda_sw": 0.01}, {}, "with lambda_sw above 0, key 'batch_size' x processes is 8, but 16"),
        ({"model_name": "moved/base", "dataset_name": "moved.jsonl"}, {}, None),
        ({"epochs": 9}, {}, None),  # max_train_steps decides
        ({}, {"precision": "bf16"}, "key 'mixed_precision' is bf16, but no"),
    ],
)
def test_what_is_compared_by_its_effect(
    settings: dict, more: dict, expected: str | None, tmp_path: Path, accelerator: Accelerator
):
    folder = save_run(config_of(tmp_path), accelerator, 1)
    config = config_of(tmp_path, **settings)
    if expected is None:
        assert find_start(config, run_of(config, accelerator, **more), accelerator).folder == folder
    else:
        with pytest.raises(InputError) as caught:
            find_start(config, run_of(config, accelerator, **more), accelerator)
        assert expected in str(caught.value)


def test_without_the_distance_a_step_may_be_split_in_any_way(tmp_path: Path, accelerator: Accelerator):
    folder = save_run(config_of(tmp_path, lambda_sw=0.0), accelerator, 1)
    config = config_of(tmp_path, lambda_sw=0.0, batch_size=2, gradient_accumulation_steps=4)
    assert find_start(config, run_of(config, accelerator, world_size=2), accelerator).folder == folder
    with pytest.raises(InputError, match="gradient_accumulation_steps x processes is 8, but 16"):
        find_start(config, run_of(config, accelerator), accelerator)


def test_other_epochs_are_refused_where_they_decide(tmp_path: Path, accelerator: Accelerator):
    save_run(config_of(tmp_path, max_train_steps=None), accelerator, 1)
    config = config_of(tmp_path, max_train_steps=None, epochs=4)
    with pytest.raises(InputError, match="key 'epochs' is 4, but 3"):
        find_start(config, run_of(config, accelerator), accelerator)


def test_other_rows_and_another_tokenizer_are_named(tmp_path: Path, accelerator: Accelerator):
    config = config_of(tmp_path)
    save_run(config, accelerator, 1)
    for rows in (ROWS[::-1], ROWS[:1], [Problem("1 + 1 = ", "2"), ROWS[1]]):
        assert data_fingerprint(rows) != data_fingerprint(ROWS)
        with pytest.raises(InputError, match="'dataset_name': arithmetic: its training rows differ"):
            find_start(config, run_of(config, accelerator, rows), accelerator)
    run = run_of(config, accelerator)
    run["fingerprints"]["tokenizer"] = "another"
    with pytest.raises(InputError, match="'model_name': assets/tiny-gemma-2: its tokenizer differs"):
        find_start(config, run, accelerator)


def test_another_base_is_named(tmp_path: Path, accelerator: Accelerator):
    config = config_of(tmp_path)
    facts = run_of(config, accelerator)
    facts["fingerprints"]["base"] = base_fingerprint(tiny_gemma())
    write_checkpoint(tmp_path, state_of(1.0), {"format": 1, "step": 1, "optimizer_step": 1, **facts}, config)
    begin = find_start(config, facts, accelerator)
    refuse_another_base(begin, facts)
    assert base_fingerprint(tiny_gemma()) == base_fingerprint(tiny_gemma())
    trained, other_cap = tiny_gemma(), tiny_gemma()
    for parameter in trained.parameters():
        parameter.data *= 1.001
    other_cap.config.final_logit_softcapping = 31.0
    for model in (trained, other_cap, tiny_gemma(seed=1)):
        run = {**facts, "fingerprints": {**facts["fingerprints"], "base": base_fingerprint(model)}}
        with pytest.raises(InputError, match="'model_name': assets/tiny-gemma-2: its weights or architecture differ"):
            refuse_another_base(begin, run)


# ---- through the launchers: the rest of a run is the uninterrupted one ----

launched = pytest.mark.launch
STEPS = 16
SETTINGS = (
    *("num_agents=2", "eval_samples=0", "logging_steps=1", "debug_subset_size=100", f"max_train_steps={STEPS}"),
    *("save_steps=5", "save_total_limit=null", "dropconnect_p=0.1", "lambda_sw=0.2"),
)
KINDS = {
    "plain-parallel": ([sys.executable, "train.py"], ("batch_size=8", "parallel_mode=parallel")),
    "plain-sequential": ([sys.executable, "train.py"], ("batch_size=8", "parallel_mode=sequential", "num_workers=1")),
    "zero2": (zero2(2), ("batch_size=4", "parallel_mode=fused")),
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


def stop_after_some_steps(command: list[str], folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to the launched process alone, once it has logged two steps."""
    with (folder.parent / f"{folder.name}.log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        end = time.monotonic() + 120
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert time.monotonic() < end
            assert process.poll() is None, Path(log.name).read_text()[-3000:]
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait(timeout=60)
    return code, Path(log.name).read_text()


@launched
@pytest.mark.parametrize(
    ("kind", "number"),
    [("plain-parallel", signal.SIGTERM), ("plain-sequential", signal.SIGINT), ("zero2", signal.SIGTERM)],
)
def test_a_run_stopped_by_a_signal_saves_and_goes_on_bitwise(
    kind: str, number: signal.Signals, uninterrupted, tmp_path: Path
):
    command, settings = KINDS[kind]
    folder = tmp_path / "run"
    code, said = stop_after_some_steps([*command, *SETTINGS, *settings, f"output_dir={folder}"], folder, number)
    newest = checkpoints(folder)[0]
    step = int(newest.name[5:])
    assert 2 <= step < STEPS
    assert f"stopped and saved after step {step}" in said
    assert code == 4 or (kind == "zero2" and code != 0)  # a launcher has its own code
    assert not (folder / "agents").exists()
    with (folder / "metrics.jsonl").open("a") as metrics:  # as a kill leaves it: later rows, the last one cut short
        metrics.write(json.dumps({"step": step + 1, "loss": 0.0}) + '\n{"step": ')
    train(command, folder, *SETTINGS, *settings)
    assert f"going on from {newest}" in (folder / "train.log").read_text()
    assert_bitwise(uninterrupted(kind), folder)


@launched
@pytest.mark.parametrize(("saved", "resumed"), [("plain-parallel", "zero2"), ("zero2", "plain-sequential")])
def test_another_engine_mode_and_number_of_processes_goes_on_within_rounding(
    saved: str, resumed: str, uninterrupted, tmp_path: Path
):
    """Where they differ, AdamW makes rounding of a gradient near zero visible: 2e-4 in a weight, at lr 2e-3."""
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


@launched
@pytest.mark.parametrize("kind", ["plain-parallel", "zero2"])
def test_a_finished_run_says_so_and_another_learning_rate_is_refused(kind: str, uninterrupted):
    folder = uninterrupted(kind)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command, settings = KINDS[kind]
    again = launch(command, *SETTINGS, *settings, f"output_dir={folder}")
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"finished after {STEPS} steps" in again.stdout
    assert "resume_from_checkpoint=null" in again.stdout
    other = launch(command, *SETTINGS, *settings, f"output_dir={folder}", "lr=0.5")
    assert other.returncode == 2 or (kind == "zero2" and other.returncode != 0)  # a launcher has its own code
    assert "error: key 'lr' is 0.5, but 0.002 in" in other.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
