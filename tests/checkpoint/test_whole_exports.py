"""An export is whole or not there: after an error, after a kill, and beside an earlier one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import CONFIG, save, values
from folders import contents
from safetensors.torch import load_file
from torch import Tensor
from toy import toy_agents

from chorus.checkpoint import export
from chorus.checkpoint.atomic_files import write_text
from chorus.checkpoint.export import save_ensemble
from chorus.config import load_config
from chorus.errors import RunError
from chorus.model.adapters import TensorId


def test_a_later_save_replaces_the_earlier_one_and_leaves_nothing_beside_it(tmp_path: Path):
    agents = toy_agents("parallel")
    save(tmp_path, agents)
    for tensor in agents.adapter_tensors().values():
        tensor.data += 1
    save(tmp_path, agents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agents", "config.yaml", "ensemble.json"]
    saved = load_file(tmp_path / "agents" / "agent_2" / "adapter_model.safetensors")
    for identity, tensor in values(agents).items():
        if identity.agent == 2:
            assert torch.equal(saved[f"{identity.path}.lora_{identity.matrix}.weight"], tensor)


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_those_who_may_read_the_folder_may_read_the_adapters(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        save(tmp_path, toy_agents("parallel"))
    finally:
        os.umask(before)
    for file in (tmp_path / "agents").glob("*/*"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_save_that_fails_leaves_the_earlier_one_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
):
    agents = toy_agents("parallel")
    save(tmp_path, agents)
    before = contents(tmp_path)
    left = iter(range(writes))
    real = export.save_tensors

    def disk_is_full(tensors: dict[str, Tensor], path: Path, *more: Any) -> None:
        if next(left, None) is None:
            path.write_bytes(b"half a file")
            raise RuntimeError("No space left on device")
        real(tensors, path, *more)

    for tensor in agents.adapter_tensors().values():
        tensor.data += 1
    monkeypatch.setattr(export, "save_tensors", disk_is_full)
    with pytest.raises(RuntimeError, match="No space left"):
        save(tmp_path, agents)
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert all(name.startswith("agents.new/") for name in after.keys() - before.keys())
    # and it is not in the way of the next save
    monkeypatch.setattr(export, "save_tensors", real)
    save(tmp_path, agents)
    assert contents(tmp_path).keys() == before.keys()


def test_a_first_save_that_fails_leaves_no_agents_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def disk_is_full(*_: Any, **__: Any) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(export, "save_tensors", disk_is_full)
    with pytest.raises(RuntimeError):
        save(tmp_path, toy_agents("parallel"))
    assert not (tmp_path / "agents").exists()
    assert not (tmp_path / "ensemble.json").exists()


class Killed(BaseException):
    """Nothing of the save runs after it, as after SIGKILL."""


def save_until_killed(folder: Path, num_acts: int, value: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Save an ensemble that ends before its `num_acts` + 1st act on the disk. Whether it was killed."""
    acts = iter(range(num_acts))

    def mortal(act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if next(acts, None) is None:
                raise Killed
            return act(*arguments, **more)

        return call

    tensors = {
        TensorId(k, "base_model.model.x", m): torch.full((2, 2), value) for k in range(2) for m in ("A", "B")
    }
    with monkeypatch.context() as patched:
        for owner, name in (
            *((export, "save_tensors"), (export, "sync"), (export.shutil, "rmtree")),
            *((Path, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "write_text")),
        ):
            patched.setattr(owner, name, mortal(getattr(owner, name)))
        try:
            save_ensemble(folder, tensors, [value, 1 - value], CONFIG, {})
        except Killed:
            return True
    return False


def saved_values(folder: Path) -> set[float]:
    """All values in a folder of agents; it fails unless both agents are whole."""
    files = [load_file(folder / f"agent_{agent}" / "adapter_model.safetensors") for agent in range(2)]
    assert all(file.keys() == {f"base_model.model.x.lora_{m}.weight" for m in ("A", "B")} for file in files)
    assert all((folder / f"agent_{agent}" / "adapter_config.json").is_file() for agent in range(2))
    return {value for file in files for tensor in file.values() for value in tensor.flatten().tolist()}


def test_a_save_killed_before_any_of_its_acts_leaves_whole_agents_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    num_acts, was_killed, found = 0, True, []
    while was_killed:
        folder = tmp_path / str(num_acts)
        folder.mkdir()
        assert not save_until_killed(folder, 1000, 0.25, monkeypatch)
        was_killed = save_until_killed(folder, num_acts, 0.75, monkeypatch)
        # Between two renames the last save stands under agents.old alone.
        place = folder / "agents" if (folder / "agents").exists() else folder / "agents.old"
        found.append(saved_values(place))
        assert json.loads((folder / "ensemble.json").read_text())["weights"] in ([0.25, 0.75], [0.75, 0.25])
        assert load_config(["--config", str(folder / "config.yaml")]) == CONFIG
        # and the next save takes it from there
        assert not save_until_killed(folder, 1000, 0.5, monkeypatch)
        assert sorted(path.name for path in folder.iterdir()) == ["agents", "config.yaml", "ensemble.json"]
        assert saved_values(folder / "agents") == {0.5}
        num_acts += 1
    assert num_acts > 15
    change = found.index({0.75})
    assert found == [{0.25}] * change + [{0.75}] * (len(found) - change)


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "ensemble.json"
    write_text(path, "first ü\n")
    assert path.read_bytes() == "first ü\n".encode()

    def fails_midway(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text[:3].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fails_midway)
        with pytest.raises(OSError, match="No space"):
            write_text(path, "second\n")
    assert path.read_text() == "first ü\n"
    write_text(path, "third\n")
    assert path.read_text() == "third\n"
    assert list(tmp_path.iterdir()) == [path]


def test_only_a_full_disk_is_answered_with_make_room(tmp_path: Path):
    agents = toy_agents("parallel")
    (tmp_path / "ensemble.json").mkdir()
    with pytest.raises(RunError) as error:
        save(tmp_path, agents)
    place = tmp_path / "ensemble.json"
    said = f"{place} could not be written: Is a directory; correct that and run the same command again"
    assert str(error.value) == said
    place.rmdir()
    save(tmp_path, agents)
