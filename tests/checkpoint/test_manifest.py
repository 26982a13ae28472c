"""The manifest: exactly the files of a checkpoint, each a plain file inside its folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from runs import config_of, run_of, save_run
from safetensors.torch import load_file, save_file
from saving import save
from tampering import vouch

from chorus.checkpoint.manifest import expected_files
from chorus.checkpoint.resume import find_start
from chorus.checkpoint.store import read_tensors, verify
from chorus.checkpoint.untrusted_files import Damaged

DIGEST = "0" * 64


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "MANIFEST.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content, indent=2) + "\n")


EDITS = {
    "empty": lambda content: content["files"].clear(),
    "without optimizer.safetensors": lambda content: content["files"].pop("optimizer.safetensors"),
    "without an agent": lambda content: content["files"].pop("agents/agent_0/adapter_model.safetensors"),
    "an absolute path": lambda content: content["files"].update({"/dev/zero": {"size": 1, "sha256": DIGEST}}),
    "a path out of it": lambda content: content["files"].update({"../x": {"size": 1, "sha256": DIGEST}}),
    "another name": lambda content: content["files"].update({"a\nb": {"size": 1, "sha256": DIGEST}}),
    "more entries": lambda content: content.update(more=1),
    "a negative size": lambda content: content["files"]["state.json"].update(size=-1),
    "a size in text": lambda content: content["files"]["state.json"].update(size="1"),
    "no digest": lambda content: content["files"]["state.json"].pop("sha256"),
    "a list": lambda content: content.update(files=[]),
    "null": lambda content: content.update(files=None),
    "a number for a file": lambda content: content["files"].update({"state.json": 7}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_that_no_run_writes_is_named(edit: str, tmp_path: Path):
    folder = save(tmp_path, 1)
    rewrite(folder, EDITS[edit])
    with pytest.raises(Damaged) as caught:
        verify(folder)
    assert str(caught.value).startswith(f"{folder}/MANIFEST.json: ")
    assert "\n" not in str(caught.value)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [*expected_files(2), "MANIFEST.json"])
def test_what_is_not_a_plain_file_is_named_and_neither_read_nor_waited_for(
    name: str, kind: str, tmp_path: Path
):
    folder = save(tmp_path, 1)
    (folder / name).unlink()
    SPECIAL[kind](folder / name)
    with pytest.raises(Damaged) as caught:
        verify(folder)
    assert str(caught.value).startswith(f"{folder / name}: ")


def test_a_link_out_of_the_folder_is_damage_although_its_bytes_are_right(tmp_path: Path):
    folder = save(tmp_path / "run", 1)
    agent = folder / "agents" / "agent_1"
    agent.rename(tmp_path / "elsewhere")
    agent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match="leads out of its folder"):
        verify(folder)


def test_a_checkpoint_may_itself_be_reached_through_a_link(tmp_path: Path):
    folder = save(tmp_path / "run", 1)
    (tmp_path / "link").symlink_to(folder)
    assert verify(tmp_path / "link").step == 1


def test_a_file_that_is_longer_than_the_manifest_says_is_not_read_to_its_end(tmp_path: Path):
    folder = save(tmp_path, 1)
    with (folder / "optimizer.safetensors").open("r+b") as file:
        file.truncate(2**43)  # sparse: 8 TB would take an hour to read
    with pytest.raises(Damaged, match=r"optimizer\.safetensors: is not as it was written"):
        verify(folder)


def test_files_of_editors_are_no_damage_and_others_are_named_and_not_read(
    tmp_path: Path, accelerator: Accelerator
):
    config = config_of(tmp_path)
    folder = save_run(config, accelerator, 1)
    for name in (".DS_Store", "agents/.state.swp", "agents/agent_0/notes~"):
        (folder / name).write_text("")
    start = find_start(config, run_of(config, accelerator), accelerator)
    assert (start.folder, list(start.notes)) == (folder, [])
    (folder / "agents" / "agent_2").mkdir()
    (folder / "agents" / "agent_2" / "adapter_model.safetensors").write_text("")
    start = find_start(config, run_of(config, accelerator), accelerator)
    assert start.folder == folder
    (note,) = start.notes
    assert note.startswith(
        f"{folder}/agents/agent_2/adapter_model.safetensors: is not part of the checkpoint"
    )
    assert {identity.agent for identity in read_tensors(folder, 1).weights} == {0, 1}


def test_a_checkpoint_under_the_name_of_another_step_is_damage(tmp_path: Path):
    folder = save(tmp_path, 1)
    renamed = folder.rename(folder.with_name("step_000009"))
    with pytest.raises(Damaged, match="step is 1, and the folder's name says 9"):
        verify(renamed)
    assert verify(folder.with_name("step_000009").rename(tmp_path / "kept")).step == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_no_run_saves_are_named(value: float, tmp_path: Path):
    folder = save(tmp_path, 1)
    file = folder / "optimizer.safetensors"
    tensors = load_file(file)
    key = sorted(tensors)[0]
    bad = {
        "is not finite": {**tensors, key: torch.full((2, 3), value)},
        "is torch.float64, not float32": {**tensors, key: tensors[key].double()},
        "has shape": {**tensors, key: torch.zeros(3, 2)},
        "is missing": {name: tensor for name, tensor in tensors.items() if name != key},
        "is not a moment": {**tensors, "more": torch.zeros(1)},
    }
    for words, edited in bad.items():
        save_file(edited, file)
        vouch(folder)
        assert verify(folder).step == 1
        with pytest.raises(Damaged, match=words):
            read_tensors(folder, 1)
