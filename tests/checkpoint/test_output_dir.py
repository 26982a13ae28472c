"""The folder of a run: made, shared, taken by one run alone, emptied or refused."""

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from folders import contents
from launching import PATIENCE_S

from chorus import collectives
from chorus.checkpoint import output_dir
from chorus.checkpoint.output_dir import LOCK_FILE, prepare_output_dir, refuse_taken
from chorus.checkpoint.resume import Start
from chorus.errors import InputError


def taken(name: str, accelerator: Any, begin: Start | None = None) -> Path:
    """Take the folder and, at the end of the run, leave it."""
    with prepare_output_dir(name, accelerator, begin) as folder:
        return folder


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def without_lock(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if Path(name).name != LOCK_FILE}


def refusal(name: str, accelerator: Accelerator, begin: Start | None = None) -> str:
    with pytest.raises(InputError) as error:
        taken(name, accelerator, begin)
    assert str(error.value).startswith(f"key 'output_dir': {name}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_new_output_folder_is_made_with_its_parents(tmp_path: Path, accelerator: Accelerator):
    folder = taken(str(tmp_path / "runs" / "of" / "today"), accelerator)
    assert content(folder) == [LOCK_FILE]


def test_an_empty_output_folder_is_used_as_it_is(tmp_path: Path, accelerator: Accelerator):
    (tmp_path / "run").mkdir()
    taken(str(tmp_path / "run"), accelerator)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_earlier_runs_step_aside_and_nothing_is_lost(
    tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str], slash: str
):
    name = str(tmp_path / "run")
    for number in range(4):
        folder = taken(name + slash, accelerator)
        assert content(folder) == [LOCK_FILE]
        (folder / "metrics.jsonl").write_text(f"run {number}")
    assert without_lock(tmp_path) == {
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
    taken(str(tmp_path / "run"), accelerator)
    assert without_lock(tmp_path) == {
        "run.1/metrics.jsonl": b"run.1",
        "run.2/metrics.jsonl": b"run",
        "run.3/metrics.jsonl": b"run.3",
    }


class SecondProcess:
    """Of two, the first of which has left `token` in the folder. It is told so as `on_first_process` is."""

    is_main_process = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch, token: Path):
        monkeypatch.setattr(
            collectives, "broadcast_object_list", lambda outcome: outcome.__setitem__(0, token)
        )


def test_only_the_first_process_moves_and_makes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "token"):
        (tmp_path / "run" / name).write_text("")
    process: Any = SecondProcess(monkeypatch, tmp_path / "run" / "token")
    assert taken(str(tmp_path / "run"), process) == tmp_path / "run"
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
    assert "it holds 'file', and is not the folder of a run; " in refusal(str(tmp_path / "src"), accelerator)
    assert contents(tmp_path) == {"src/file": b"kept"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("below", [".", "run"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, accelerator: Accelerator, below: str):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert f"{locked} cannot be written" in refusal(str(locked / below), accelerator)


def test_a_folder_that_the_system_refuses_to_make_is_refused(tmp_path: Path, accelerator: Accelerator):
    """Also for root: no name is that long, nothing can be made
    in /proc, and a link to nothing is in the way."""
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


# ---- one run, one folder ----


def hold(folder: Path, accelerator: Accelerator, barrier: Any, outcomes: Any) -> None:
    """In a process of its own: take the folder once all others are
    there, and keep it until the process is killed."""
    barrier.wait(PATIENCE_S)
    try:
        with prepare_output_dir(str(folder), accelerator):
            outcomes.put("taken")
            signal.pause()
    except InputError as error:
        outcomes.put(str(error))


@contextmanager
def at_work(folder: Path, accelerator: Accelerator, count: int = 1) -> Iterator[tuple[list[Any], list[str]]]:
    """So many processes that try to take the folder at the same instant, and what has become of each."""
    fork = multiprocessing.get_context("fork")
    barrier, outcomes = fork.Barrier(count), fork.Queue()
    others = [fork.Process(target=hold, args=(folder, accelerator, barrier, outcomes)) for _ in range(count)]
    for other in others:
        other.start()
    try:
        yield others, [outcomes.get(timeout=PATIENCE_S) for _ in others]
    finally:
        for other in others:
            other.kill()
            other.join()


def test_a_folder_of_a_run_at_work_is_refused_by_every_way_to_it_and_nothing_in_it_changes(
    tmp_path: Path, accelerator: Accelerator
):
    run, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(run)
    with at_work(run, accelerator) as ([other], outcomes):
        assert outcomes == ["taken"]
        (run / "metrics.jsonl").write_text("rows")
        before = contents(tmp_path)
        for name in (run, link, run / "." / ".." / "run"):
            message = refusal(str(name), accelerator)
            assert f"another run is using it (process {other.pid} on " in message
            with pytest.raises(InputError, match="another run is using it"):
                refuse_taken(name)
        with pytest.raises(InputError, match="another run is using it"):
            taken(str(run), accelerator, Start(in_place=True))
        assert contents(tmp_path) == before
        other.kill()
        other.join()
        refuse_taken(run)
        taken(str(run), accelerator)
    assert without_lock(tmp_path) == {"run.1/metrics.jsonl": b"rows"}


def test_of_processes_that_take_a_folder_at_the_same_instant_one_gets_it(
    tmp_path: Path, accelerator: Accelerator
):
    for number in range(10):
        folder = tmp_path / str(number) / "run"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("rows")
        with at_work(folder, accelerator, count=4) as (_, outcomes):
            assert outcomes.count("taken") == 1
            assert sum("another run is using it" in outcome for outcome in outcomes) == 3
        assert without_lock(folder.parent) == {"run.1/metrics.jsonl": b"rows"}


def test_a_folder_that_changed_since_the_start_was_found_is_refused(tmp_path: Path, accelerator: Accelerator):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_000003").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("rows")
    message = refusal(str(run), accelerator, Start(seen=("step_000002",)))
    assert message.endswith("another run has changed its checkpoints a moment ago; start this run again")
    taken(str(run), accelerator, Start(seen=("step_000003",)))
    assert (tmp_path / "run.1" / "checkpoints" / "step_000003").is_dir()


# ---- links, mount points and what is not a run's ----


def test_a_link_stays_and_what_lies_behind_it_is_moved_on_its_own_disk(
    tmp_path: Path, accelerator: Accelerator
):
    disk, link = tmp_path / "disk" / "run", tmp_path / "link"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    (disk / "metrics.jsonl").write_text("rows")
    assert taken(str(link), accelerator) == link
    assert link.is_symlink()
    assert content(disk) == [LOCK_FILE]
    assert without_lock(tmp_path / "disk") == {"run.1/metrics.jsonl": b"rows"}


def test_where_nothing_can_be_made_beside_the_folder_earlier_runs_are_kept_in_it(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    """A mount point is such a folder: beside it is another disk.
    Nothing can be made beside a name of full length."""
    run = tmp_path / ("r" * 255)
    run.mkdir()
    for number in range(2):
        (run / "metrics.jsonl").write_text(f"run {number}")
        taken(str(run), accelerator)
    assert without_lock(run) == {"earlier.1/metrics.jsonl": b"run 0", "earlier.2/metrics.jsonl": b"run 1"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_mount_point_stays_and_keeps_earlier_runs(tmp_path: Path, accelerator: Accelerator):
    run = tmp_path / "run"
    run.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "none", str(run)], capture_output=True, check=False
    ).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        (run / "metrics.jsonl").write_text("rows")
        taken(str(run), accelerator)
        assert without_lock(run) == {"earlier.1/metrics.jsonl": b"rows"}
        assert content(tmp_path) == ["run"]
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_files_of_systems_and_editors_do_not_count(tmp_path: Path, accelerator: Accelerator):
    run = tmp_path / "run"
    (run / "lost+found").mkdir(parents=True)
    for name in (".DS_Store", "._x", ".notes.swp", "notes~", ".nfs0001", "Thumbs.db"):
        (run / name).write_text("")
    before = content(run)
    taken(str(run), accelerator)
    assert content(run) == sorted([*before, LOCK_FILE])
    assert content(tmp_path) == ["run"]


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_a_lock_file_that_is_not_a_plain_file_is_refused_and_not_waited_for(
    tmp_path: Path, accelerator: Accelerator, kind: str
):
    run = tmp_path / "run"
    run.mkdir()
    lock = run / LOCK_FILE
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("kept")
    make = {"fifo": os.mkfifo, "link": lambda path: path.symlink_to(elsewhere), "folder": Path.mkdir}
    make[kind](lock)
    assert f": {LOCK_FILE} is not a plain file; remove it" in refusal(str(run), accelerator)
    assert elsewhere.read_text() == "kept"
    lock.rmdir() if kind == "folder" else lock.unlink()
    taken(str(run), accelerator)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", "ensemble.json"])
def test_a_run_is_not_resumed_where_a_file_of_it_is_a_folder_or_a_fifo(
    tmp_path: Path, accelerator: Accelerator, name: str, make: Callable[[Path], None]
):
    run = tmp_path / "run"
    run.mkdir()
    make(run / name)
    said = refusal(str(run), accelerator, Start(in_place=True))
    assert said.endswith(f"{name} is not a plain file; remove it")
    os.rmdir(run / name) if make is os.mkdir else (run / name).unlink()
    taken(str(run), accelerator, Start(in_place=True))


def test_a_link_that_leads_nowhere_is_named_with_what_to_do(tmp_path: Path, accelerator: Accelerator):
    link, target = tmp_path / "run", tmp_path / "disk"
    link.symlink_to(target)
    for name in (link, link / "below"):
        said = refusal(str(name), accelerator)
        assert said.endswith(
            f"{link} is a link to {target}, which is not there; make that folder, or remove the link"
        )
    target.mkdir()
    taken(str(link), accelerator)
    link.unlink()
    taken(str(link), accelerator)
    assert link.is_dir()
