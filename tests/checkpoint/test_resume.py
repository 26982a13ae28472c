"""Where a run begins, and what may differ from its checkpoint; test_resumed_runs.py has how it goes on."""

import re
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
from accelerate import Accelerator
from key_values import other_value
from runs import ROWS, config_of, run_of, save_run
from saving import state_of
from toy import tiny_gemma

from chorus.checkpoint import resume
from chorus.checkpoint.fingerprints import base_fingerprint
from chorus.checkpoint.resume import find_start, load_best, refuse_another_base
from chorus.checkpoint.state_file import BestStep
from chorus.checkpoint.store import write_checkpoint
from chorus.config import Config, on_resume
from chorus.config.load import config_over
from chorus.config.section import OnResume
from chorus.data.rows import data_fingerprint
from chorus.data.templates import Problem
from chorus.errors import InputError

# ---- which checkpoint ----


def test_without_a_checkpoint_or_with_null_a_run_begins_anew(tmp_path: Path, accelerator: Accelerator):
    config = config_of(tmp_path)
    assert find_start(config, run_of(config, accelerator), accelerator).folder is None
    save_run(config, accelerator, 2)
    config = config_of(tmp_path, resume_from_checkpoint=None)
    begin = find_start(config, run_of(config, accelerator), accelerator)
    assert (begin.folder, begin.step, begin.in_place) == (None, 0, False)


def test_a_checkpoint_that_the_first_process_has_found_and_this_one_does_not_see_is_refused(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    """As on a second host without the folder: each process reads the tensors for itself."""
    config = config_of(tmp_path)
    found = resume.Start(tmp_path / "on_another_disk" / "step_000002")
    monkeypatch.setattr(resume, "on_first_process", lambda accelerator, act: found)
    with pytest.raises(InputError, match=f"{found.folder} is not seen; name a folder that all hosts share"):
        find_start(config, run_of(config, accelerator), accelerator)


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
    for way_out in ("null to start over", "auto, which takes .*/step_000002"):
        with pytest.raises(InputError, match=rf"^{folder}/state.json: .*; name another.*={way_out}$"):
            find_start(named, run_of(named, accelerator), accelerator)
        if way_out.startswith("null"):
            save_run(config, accelerator, 2)
    for other in (tmp_path, tmp_path / "nothing", tmp_path / ("x" * 300)):
        config = config_of(tmp_path, resume_from_checkpoint=str(other))
        with pytest.raises(
            InputError, match=r"'resume_from_checkpoint': .* is not a checkpoint; name a folder such as"
        ):
            find_start(config, run_of(config, accelerator), accelerator)


def test_a_best_step_whose_checkpoint_is_gone_is_named_with_what_helps(tmp_path: Path):
    best = BestStep(step=3, metric="uniform/token/NLL", value=1.0)
    with pytest.raises(InputError, match=r"step_000003.*; it is the best step's: set load_best_model_at"):
        load_best(cast(Any, None), tmp_path, best)


def test_a_checkpoint_of_another_folder_is_not_gone_on_with_in_place(
    tmp_path: Path, accelerator: Accelerator
):
    folder = save_run(config_of(tmp_path / "one"), accelerator, 1)
    config = config_of(tmp_path / "two", resume_from_checkpoint=str(folder))
    assert not find_start(config, run_of(config, accelerator), accelerator).in_place


# ---- what may change ----


@pytest.mark.parametrize("key", [key for key in Config.model_fields if on_resume(key) is OnResume.MUST_EQUAL])
def test_a_key_that_makes_another_run_is_refused_with_both_values(
    key: str, tmp_path: Path, accelerator: Accelerator
):
    old = config_of(tmp_path)
    folder = save_run(old, accelerator, 1)
    config = old.model_copy(update={key: other_value(key)})
    with pytest.raises(InputError) as caught:
        find_start(config, run_of(config, accelerator), accelerator)
    line = str(caught.value)
    values = [str(getattr(each, key)) for each in (config, old)]
    ours, theirs = (value if "\n" not in value else repr(value) for value in values)
    assert line.startswith(f"key '{key}' is {ours}, but {theirs} in {folder}; "), line
    assert "\n" not in line
    assert "resume_from_checkpoint=null" in line


def test_a_refusal_names_all_that_is_to_be_set_as_a_command_line_takes_it(
    tmp_path: Path, accelerator: Accelerator
):
    # As after a default has changed: nothing was set that could be set back.
    old = config_of(tmp_path, dropconnect_p=[0.0, 0.25], lambda_sw=0.01)
    folder = save_run(old, accelerator, 1)
    config = old.model_copy(update={"lambda_sw": 0.0, "dropconnect_p": 0.0, "init_adapters_from": "runs/a b"})
    with pytest.raises(InputError) as caught:
        find_start(config, run_of(config, accelerator), accelerator)
    said = re.search(r"set (.*), or start over", str(caught.value))
    assert said is not None
    assert sorted(shlex.split(said[1])) == [
        "dropconnect_p=[0.0, 0.25]",
        "init_adapters_from=null",
        "lambda_sw=0.01",
    ]
    back = config_over(config.model_dump(), shlex.split(said[1]), "the remedy")
    assert find_start(back, run_of(back, accelerator), accelerator).folder == folder
    save_run(old.model_copy(update={"prompt_template": "{question}\n" * 30}), accelerator, 2)
    with pytest.raises(InputError, match="; set it back, or start over"):
        find_start(old, run_of(old, accelerator), accelerator)


def test_keys_that_say_how_a_run_is_carried_out_may_change(tmp_path: Path, accelerator: Accelerator):
    old = config_of(tmp_path)
    folder = save_run(old, accelerator, 1)
    keys = {key for key in Config.model_fields if on_resume(key) is OnResume.MAY_CHANGE} - {
        "output_dir",
        "resume_from_checkpoint",
    }
    config = old.model_copy(update={key: other_value(key) for key in keys})
    assert find_start(config, run_of(config, accelerator), accelerator).folder == folder


@pytest.mark.parametrize(
    ("settings", "more", "expected"),
    [
        ({"batch_size": 8, "lambda_sw": 0.01}, {"world_size": 2}, None),
        ({"batch_size": 16, "lambda_sw": 0.01, "agent_parallel_size": 2}, {"world_size": 2}, None),
        (
            {"batch_size": 16, "lambda_sw": 0.01, "agent_parallel_size": 2},
            {"world_size": 4},
            "with lambda_sw above 0, key 'batch_size' x processes / agent_parallel_size is 32, but 16",
        ),
        (
            {"batch_size": 4, "gradient_accumulation_steps": 4, "lambda_sw": 0.01},
            {},
            "key 'batch_size' x processes is 4",
        ),
        (
            {"batch_size": 8, "lambda_sw": 0.01},
            {},
            "with lambda_sw above 0, key 'batch_size' x processes is 8, but 16",
        ),
        ({"model_name": "moved/base", "dataset_name": "moved.jsonl"}, {}, None),
        ({"epochs": 9}, {}, None),  # max_train_steps decides
        ({}, {"precision": "bf16"}, "key 'mixed_precision' is bf16, but no"),
    ],
)
def test_what_is_compared_by_its_effect(
    settings: dict, more: dict, expected: str | None, tmp_path: Path, accelerator: Accelerator
):
    old = config_of(tmp_path, lambda_sw=settings.get("lambda_sw", 0.0))
    folder = save_run(old, accelerator, 1)
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
        with pytest.raises(InputError, match="'dataset_name': arithmetic_hard: its training rows differ"):
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
    refuse_another_base(begin, facts, config)
    assert base_fingerprint(tiny_gemma()) == base_fingerprint(tiny_gemma())
    trained, other_cap = tiny_gemma(), tiny_gemma()
    for parameter in trained.parameters():
        parameter.data *= 1.001
    other_cap.config.final_logit_softcapping = 31.0
    for model in (trained, other_cap, tiny_gemma(seed=1)):
        run = {**facts, "fingerprints": {**facts["fingerprints"], "base": base_fingerprint(model)}}
        with pytest.raises(
            InputError, match="'model_name': assets/tiny-gemma-2: its weights or architecture differ"
        ):
            refuse_another_base(begin, run, config)
