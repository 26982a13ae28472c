"""The folder of a run: made, checked and taken by one run alone."""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from uuid import uuid4

from accelerate import Accelerator

from chorus.collectives import on_every_process, on_first_process
from chorus.errors import InputError

LOG_FILE = "train.log"  # locked by the run that writes it, and freed by the system when that run ends, however it ends
SHARED_WITHIN_S = 60.0  # a client of a network file system may believe for so long that a new file does not exist


def prepare_output_dir(name: str, accelerator: Accelerator, resumed: bool = False) -> Path:
    """Make `output_dir`, empty. A folder that an earlier run filled steps aside to `NAME.1`, `NAME.2`, ...

    A run that is `resumed` from a checkpoint of this very folder goes on in it.

    Raises:
        InputError: on every process alike: it is a file, cannot be made or written, holds what no run has written, is
            being written by another run, or is not the same folder for every process.
    """
    folder = Path(name)
    on_every_process(partial(refuse_unusable, folder, resumed))  # before one of them changes anything
    token = on_first_process(accelerator, partial(_make, folder, resumed))
    try:
        on_every_process(partial(refuse_unshared, token))
    finally:
        if accelerator.is_main_process:
            token.unlink()
    return folder


def _make(folder: Path, resumed: bool) -> Path:
    """Make the folder, with a file in it that no other folder has."""
    with _as_input_errors(folder):
        if not resumed:
            _step_aside(folder)
            folder.mkdir(parents=True, exist_ok=True)
        token = folder / f".seen-by-all-{uuid4()}"
        token.touch()
        return token


def refuse_unshared(token: Path) -> None:
    """Raises InputError on a host that has a folder of its own under that name: the first process alone writes."""
    end = time.monotonic() + SHARED_WITHIN_S
    while not token.exists():
        if time.monotonic() > end:
            raise InputError(
                f"key 'output_dir': {token.parent}: what the first process writes there is not seen; name a folder "
                "that all hosts share"
            )
        time.sleep(0.2)


@contextmanager
def _as_input_errors(folder: Path) -> Iterator[None]:
    """A name too long, a mount point that cannot step aside, a link to nothing."""
    try:
        yield
    except OSError as error:
        raise InputError(f"key 'output_dir': {folder}: {error.strerror}; name a folder that can be made") from error


def refuse_unusable(folder: Path, resumed: bool) -> None:
    """Raises InputError where a run could not write `folder`, or must not."""
    with _as_input_errors(folder):
        if Path.cwd().is_relative_to(os.path.realpath(folder)):
            raise InputError(f"key 'output_dir': {folder}: the program runs in it; name a folder for this run alone")
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            what = "cannot be written" if nearest.is_dir() else "is a file"
            raise InputError(f"key 'output_dir': {folder}: {nearest} {what}; name a folder that can be made")
        is_a_runs = resumed or (folder / "metrics.jsonl").exists()
        if nearest == folder and any(folder.iterdir()) and not is_a_runs:
            raise InputError(f"key 'output_dir': {folder}: it holds files that are no run's; name a folder of its own")
        if is_at_work(folder):
            raise InputError(f"key 'output_dir': {folder}: another run is at work in it; wait, or name another folder")


def is_at_work(folder: Path) -> bool:
    """Whether a run of another process, on this machine or another that shares the folder, is writing its log."""
    if not (folder / LOG_FILE).exists():
        return False
    with (folder / LOG_FILE).open("rb") as log:
        try:
            fcntl.lockf(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _step_aside(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        number = next(n for n in count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))
        print(f"{folder} held an earlier run, which is now {folder}.{number}", file=sys.stderr)
