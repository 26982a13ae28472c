"""`state.json`: an entry that no run writes is named in one line, also where the manifest vouches for it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from runs import config_of, run_of, save_run
from tampering import edit_state, set_entry, vouch

from chorus.checkpoint.resume import find_start
from chorus.checkpoint.state_file import SavedConfig, StateFile, read_state_file
from chorus.checkpoint.untrusted_files import Damaged
from chorus.config import Config
from chorus.errors import InputError

BAD = {
    "step": [-5, 0, 1, 3, 10**18, 10**30, 1.0, "1", True, None, [1], {}, 10**400],
    "optimizer_step": [
        -3,
        3,
        10**18,
        "1",
        None,
        [],
        [1],
        [1, 1, 1],
        [1, 3],
        [1, -1],
        [1, "1"],
        [[1], [1]],
        True,
    ],
    "epoch": [-1, "0", None, 0.0],
    "skips_in_a_row": [-1, 3, "0", None],
    "num_steps": [0, -1, 1, 10**18, 99, "100", None],
    "world_size": [0, -1, "1", 1.5, None],
    "precision": ["fp8", 16, None],
    "fingerprints": [None, {}, [], "0" * 64],
    "fingerprints.base": ["", "x", 7, None, "0" * 63],
    "config": [None, {}, [], "config"],
    "config.num_agents": [0, 3, -1, "2", "auto", None],
    "config.batch_size": [0, -4, "16", None, True],
    "config.gradient_accumulation_steps": [0, 1.0, None],
    "best": [
        {"step": 1, "metric": "uniform/token/NLL", "value": float("nan")},
        {"step": 1, "metric": "uniform/token/NLL", "value": float("inf")},
        {"step": 0, "metric": "uniform/token/NLL", "value": 1.0},
        [],
    ],
    "format": ["1", 1.0, None, [1], True],
}


@pytest.mark.parametrize("entry", BAD)
def test_an_entry_that_no_run_writes_is_named_and_the_checkpoint_passed_over(
    entry: str, tmp_path: Path, accelerator: Accelerator
):
    config = config_of(tmp_path)
    whole, edited = save_run(config, accelerator, 1), save_run(config, accelerator, 2)
    kept = (edited / "state.json").read_text()
    named = config.model_copy(update={"resume_from_checkpoint": str(edited)})
    run = run_of(config, accelerator)
    for value in BAD[entry]:
        edit_state(edited, lambda state, value=value: set_entry(state, entry, value))
        start = find_start(config, run, accelerator)
        assert start.folder == whole, value
        assert start.notes[0].startswith(f"{edited}/state.json: "), start.notes
        assert entry.rpartition(".")[2] in start.notes[0]
        with pytest.raises(InputError) as caught:
            find_start(named, run, accelerator)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{edited}/state.json: ")
        (edited / "state.json").write_text(kept)
        vouch(edited)
    assert find_start(config, run, accelerator).folder == edited


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "1", "null", "NaN", "[" * 100_000, '{"format": 1', "\ufeff{}", "\x00"]
)
def test_a_text_that_is_not_a_json_object_is_damage(content: str, tmp_path: Path, accelerator: Accelerator):
    folder = save_run(config_of(tmp_path), accelerator, 1)
    (folder / "state.json").write_text(content)
    with pytest.raises(Damaged, match=r"state\.json: is not as a run writes it: "):
        read_state_file(folder)


def test_an_older_file_without_today_s_later_entries_is_read(tmp_path: Path, accelerator: Accelerator):
    """Entries and keys that were added since take their
    defaults; those that were removed since are ignored."""
    config = config_of(tmp_path)
    folder = save_run(config, accelerator, 1)

    def older(state: dict[str, Any]) -> None:
        state.pop("skips_in_a_row", None)
        del state["config"]["lora_dropout"], state["config"]["packing"]
        state["config"]["a_key_that_is_gone"] = 7

    edit_state(folder, older)
    start = find_start(config, run_of(config, accelerator), accelerator)
    assert (start.folder, start.skips_in_a_row) == (folder, 0)


def test_the_typed_entries_are_keys_of_the_configuration_and_its_own_dump_is_accepted():
    assert SavedConfig.model_fields.keys() <= Config.model_fields.keys()
    saved = SavedConfig.model_validate_json(json.dumps(Config().model_dump()))
    assert saved.values() == Config().model_dump()
    assert {
        "format",
        "step",
        "epoch",
        "optimizer_step",
        "config",
        "fingerprints",
    } <= StateFile.model_fields.keys()


def test_a_step_beyond_the_end_of_the_run_is_damage(tmp_path: Path, accelerator: Accelerator):
    config = config_of(tmp_path, max_train_steps=None)
    edited = save_run(config, accelerator, 2)
    edit_state(edited, lambda state: set_entry(state, "num_steps", 1))
    start = find_start(config, run_of(config, accelerator), accelerator)
    assert start.folder is None
    assert "step is 2, beyond num_steps 1" in start.notes[0]


@pytest.mark.parametrize("step", [0, 10**18])
def test_a_step_out_of_range_is_damage_also_in_a_folder_of_another_name(
    step: int, tmp_path: Path, accelerator: Accelerator
):
    config = config_of(tmp_path / "run")
    copy = save_run(config, accelerator, 2).rename(tmp_path / "copy")
    edit_state(copy, lambda state: state.update(step=step, optimizer_step=0))
    named = config.model_copy(update={"resume_from_checkpoint": str(copy)})
    with pytest.raises(InputError, match=r"entry 'step' .* should be (greater|less) than or equal to"):
        find_start(named, run_of(config, accelerator), accelerator)


def test_processes_over_which_the_agents_could_not_be_spread_are_damage(
    tmp_path: Path, accelerator: Accelerator
):
    folder = save_run(config_of(tmp_path), accelerator, 2)
    edit_state(folder, lambda state: state["config"].update(agent_parallel_size=2))
    edit_state(folder, lambda state: state.update(world_size=3))
    with pytest.raises(Damaged, match="world_size is 3, and agent_parallel_size 2"):
        read_state_file(folder)


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path, accelerator: Accelerator):
    folder = save_run(config_of(tmp_path), accelerator, 2)
    os.truncate(folder / "state.json", 2**40)  # takes no room
    with pytest.raises(Damaged, match=r"state\.json: is larger than 67,108,864 bytes"):
        read_state_file(folder)
