"""The folder of a run: created, checked, and locked by one run at a time.

A run locks `run.lock` in its folder and keeps the lock until its process ends, however it ends. It does not
wait for the lock, and moves or writes nothing in the folder before it holds it. The folder itself stays where
it is: the files of an earlier run are moved out of it, so a link or a mount point stays valid.
"""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from accelerate import Accelerator

from chorus.checkpoint.resume import Start
from chorus.checkpoint.store import checkpoints
from chorus.checkpoint.untrusted_files import is_incidental
from chorus.collectives import on_every_process, on_first_process
from chorus.errors import InputError

LOCK_FILE = "run.lock"
MARKS = ("metrics.jsonl", LOCK_FILE)  # a folder with one of these is a run's
FILES_OF_A_RUN = (".json", ".jsonl", ".yaml", ".log")
EARLIER = "earlier."  # prefix of a folder of earlier runs inside `output_dir`
# For so long a client of a network file system may cache that a new file does not exist.
SHARED_WITHIN_S = 60.0


@contextmanager
def prepare_output_dir(name: str, accelerator: Accelerator, begin: Start | None = None) -> Iterator[Path]:
    """Take `output_dir` for this run. Within the context no other run can take it.

    A run that resumes from a checkpoint of this folder finds it unchanged. Any other run finds it empty: the
    files of earlier runs are moved to `NAME.1`, `NAME.2`, ... beside it, or to `earlier.1`, ... inside it
    where it is a mount point or its parent is read-only. A collective call.

    Args:
        begin: where the run begins, as found before the folder was locked.

    Raises:
        InputError: on every process alike: it is a file, cannot be made or written, holds files that are not
            a run's, belongs to a run that is still running, has changed since `begin` was found, or is not
            the same folder for every process.
    """
    begin = begin or Start()
    folder = Path(name)
    on_every_process(partial(refuse_unusable, folder, begin.in_place))  # before one of them changes anything
    locks: list[TextIO] = []

    def take() -> Path:
        with _as_input_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            locks.append(_lock(folder))
            print(f"process {os.getpid()} on {socket.gethostname()}", file=locks[0], flush=True)
            _refuse_changed(folder, begin)
            if begin.in_place:
                _refuse_special_files(folder)
            else:
                _move_out(folder)
            token = folder / f".seen-by-all-{uuid4()}"  # no other folder has a file of this name
            token.touch()
            return token

    try:
        token = on_first_process(accelerator, take)
        try:
            on_every_process(partial(refuse_unshared, token))
        finally:
            if accelerator.is_main_process:
                token.unlink()
        yield folder
    finally:
        for lock in locks:
            lock.close()


def refuse_unshared(token: Path) -> None:
    """Raise InputError on a host where the folder is not the shared one: only the first process writes."""
    end = time.monotonic() + SHARED_WITHIN_S
    while not token.exists():
        if time.monotonic() > end:
            raise InputError(
                f"key 'output_dir': {token.parent}: what the first process writes there is not seen; name a "
                "folder that all hosts share"
            )
        time.sleep(0.2)


@contextmanager
def _as_input_errors(folder: Path) -> Iterator[None]:
    """Such as a name that is too long."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"key 'output_dir': {folder}: {error.strerror}; name a folder that can be made"
        ) from error


def refuse_unusable(folder: Path, resumed: bool) -> None:
    """Raise InputError where a run cannot or must not write `folder`. Changes nothing.

    Only the lock tells whether another run is using it: `refuse_taken`.
    """
    with _as_input_errors(folder):
        if Path.cwd().is_relative_to(os.path.realpath(folder)):
            raise InputError(
                f"key 'output_dir': {folder}: the program runs in it; name a folder for this run alone"
            )
        nearest = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        if not nearest.exists():
            raise InputError(
                f"key 'output_dir': {folder}: {nearest} is a link to {os.readlink(nearest)}, which is not "
                "there; make that folder, or remove the link"
            )
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            what = "cannot be written" if nearest.is_dir() else "is a file"
            raise InputError(f"key 'output_dir': {folder}: {nearest} {what}; name a folder that can be made")
        if nearest == folder and not resumed and _foreign(folder):
            raise InputError(
                f"key 'output_dir': {folder}: it holds {_foreign(folder)[0]!r}, and is not the folder of a "
                "run; name a folder for this run alone"
            )


def _foreign(folder: Path) -> list[str]:
    """What lies in a folder that is not a run's."""
    names = sorted(path.name for path in folder.iterdir() if not is_incidental(path.name))
    return [] if any(mark in names for mark in MARKS) else names


def refuse_taken(folder: Path) -> None:
    """Raise InputError where another run is using `folder` now. For a dry run, which does not lock it."""
    if os.path.isfile(folder / LOCK_FILE):
        _lock(folder).close()


def _lock(folder: Path) -> TextIO:
    """Lock the folder without waiting. The lock is held until the returned file is closed or the process
    ends.

    The lock is POSIX's: a network file system passes it to its server, and a process that the run has forked
    does not hold it. The system drops it with the first file of that name that the process closes, so nothing
    else may open it.

    Raises:
        InputError: another process has locked it, or the file system has no locks.
    """
    place = folder / LOCK_FILE
    if place.is_symlink() or (place.exists() and not place.is_file()):
        raise InputError(_not_plain(place))
    # Under that name there may be a link or a device, which must not be written to, or a FIFO, which would
    # block.
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    file = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)  # the name of the last holder
    except OSError as error:
        holder = file.readline(200).strip()
        file.close()
        if not isinstance(
            error, (BlockingIOError, PermissionError)
        ):  # POSIX allows either error for a held lock
            raise InputError(
                f"key 'output_dir': {folder}: it cannot be locked ({error.strerror}); name a folder on a "
                "file system that has locks"
            ) from error
        raise InputError(
            f"key 'output_dir': {folder}: another run is using it ({holder or 'unnamed'}); wait for "
            "its end, or name another folder"
        ) from error
    return file


def _refuse_changed(folder: Path, begin: Start) -> None:
    """Raise InputError where another run has changed the folder between the search for a checkpoint and the
    lock.
    """
    if begin.seen is not None and tuple(begin.seen) != tuple(path.name for path in checkpoints(folder)):
        raise InputError(
            f"key 'output_dir': {folder}: another run has changed its checkpoints a moment ago; start this "
            "run again"
        )


def _refuse_special_files(folder: Path) -> None:
    """Raise InputError for a FIFO or a device in the folder, to which writing could block forever, and for a
    folder in the place of a file.
    """
    for path in sorted(folder.iterdir()):
        if not path.is_file() and (not path.is_dir() or path.suffix in FILES_OF_A_RUN):
            raise InputError(_not_plain(path))


def _not_plain(path: Path) -> str:
    return f"key 'output_dir': {path.parent}: {path.name} is not a plain file; remove it"


def _move_out(folder: Path) -> None:
    """Move what earlier runs left in `folder`, on the same disk.
    Checkpoints first: they decide where a run begins."""
    names = sorted(path.name for path in folder.iterdir() if not is_incidental(path.name))
    names = [name for name in names if name != LOCK_FILE and not name.startswith(EARLIER)]
    if not names:
        return
    place = _new_place(folder)
    for name in sorted(names, key=lambda name: name != "checkpoints"):
        (folder / name).rename(place / name)
    print(f"{folder} held an earlier run, which is now in {place}", file=sys.stderr)


def _new_place(folder: Path) -> Path:
    """A new, empty folder on the disk of `folder`."""
    target = Path(os.path.realpath(folder))
    for number in count(1):
        place = target.with_name(f"{target.name}.{number}")
        try:
            place.mkdir()
        except FileExistsError:
            continue
        except OSError:  # the parent is read-only, or the name too long
            break
        if place.stat().st_dev == target.stat().st_dev:
            return place if target != Path(os.path.abspath(folder)) else folder.with_name(place.name)
        place.rmdir()  # the folder is a mount point
        break
    place = next(path for path in (folder / f"{EARLIER}{n}" for n in count(1)) if not path.exists())
    place.mkdir()
    return place
