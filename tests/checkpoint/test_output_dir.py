"""The folder that a run is given: made, shared, set aside or refused."""

import os
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from folders import contents

from chorus import collectives
from chorus.checkpoint import output_dir
from chorus.checkpoint.output_dir import prepare_output_dir
from chorus.errors import InputError


def refusal(name: str, accelerator: Accelerator) -> str:
    with pytest.raises(InputError) as error:
        prepare_output_dir(name, accelerator)
    assert str(error.value).startswith(f"key 'output_dir': {name}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_new_output_folder_is_made_with_its_parents(tmp_path: Path, accelerator: Accelerator):
    folder = prepare_output_dir(str(tmp_path / "runs" / "of" / "today"), accelerator)
    assert folder.is_dir()
    assert not list(folder.iterdir())


def test_an_empty_output_folder_is_used_as_it_is(tmp_path: Path, accelerator: Accelerator):
    (tmp_path / "run").mkdir()
    prepare_output_dir(str(tmp_path / "run"), accelerator)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_earlier_runs_step_aside_and_nothing_is_lost(
    tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str], slash: str
):
    name = str(tmp_path / "run")
    for number in range(4):
        folder = prepare_output_dir(name + slash, accelerator)
        assert not list(folder.iterdir())
        (folder / "metrics.jsonl").write_text(f"run {number}")
    assert contents(tmp_path) == {
        "run/metrics.jsonl": b"run 3",
        "run.1/metrics.jsonl": b"run 0",
        "run.2/metrics.jsonl": b"run 1",
        "run.3/metrics.jsonl": b"run 2",
    }
    first, *_ = capsys.readouterr().err.splitlines()
    assert f"{name}.1" in first


def test_a_number_that_is_taken_is_passed_over(tmp_path: Path, accelerator: Accelerator):
    for name in ("run", "run.1", "run.3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(name)
    prepare_output_dir(str(tmp_path / "run"), accelerator)
    assert contents(tmp_path) == {
        "run.1/metrics.jsonl": b"run.1",
        "run.2/metrics.jsonl": b"run",
        "run.3/metrics.jsonl": b"run.3",
    }


class SecondProcess:
    """Of two, the first of which has left `token` in the folder. It is told so as `on_first_process` is."""

    is_main_process = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch, token: Path):
        monkeypatch.setattr(collectives, "broadcast_object_list", lambda outcome: outcome.__setitem__(0, token))


def test_only_the_first_process_moves_and_makes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "token"):
        (tmp_path / "run" / name).write_text("")
    process: Any = SecondProcess(monkeypatch, tmp_path / "run" / "token")
    assert prepare_output_dir(str(tmp_path / "run"), process) == tmp_path / "run"
    assert contents(tmp_path) == {"run/metrics.jsonl": b"", "run/token": b""}


def test_a_folder_that_is_not_the_first_processs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(output_dir, "SHARED_WITHIN_S", 0.1)
    process: Any = SecondProcess(monkeypatch, tmp_path / "run" / "token")
    assert "what the first process writes there is not seen" in refusal(str(tmp_path / "run"), process)


@pytest.mark.parametrize("below", ["", "run", "run/of/today"])
def test_a_file_in_the_way_is_refused_and_named(tmp_path: Path, accelerator: Accelerator, below: str):
    (tmp_path / "file").write_text("kept")
    message = refusal(str(tmp_path / "file" / below), accelerator)
    assert f"{tmp_path / 'file'} is a file" in message
    assert contents(tmp_path) == {"file": b"kept"}


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path, accelerator: Accelerator):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "file").write_text("kept")
    assert "no run's" in refusal(str(tmp_path / "src"), accelerator)
    assert contents(tmp_path) == {"src/file": b"kept"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("below", [".", "run"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, accelerator: Accelerator, below: str):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert f"{locked} cannot be written" in refusal(str(locked / below), accelerator)


def test_a_folder_that_the_system_refuses_to_make_is_refused(tmp_path: Path, accelerator: Accelerator):
    """Also for root: no name is that long, nothing can be made in /proc, and a link to nothing is in the way."""
    (tmp_path / "link").symlink_to(tmp_path / "nothing" / "there")
    for name in (str(tmp_path / ("x" * 300)), "/proc/run", str(tmp_path / "link")):
        refusal(name, accelerator)


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_that_cannot_step_aside_is_refused(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, name: str
):
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").write_text("kept")
    monkeypatch.chdir(here)
    refusal(name, accelerator)
    assert contents(tmp_path) == {"here/file": b"kept"}
