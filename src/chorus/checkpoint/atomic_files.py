"""Small files written whole or not at all, and the errors of a full disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from chorus.errors import RunError, out_of_memory


@contextmanager
def disk_errors(place: Path, num_bytes: int, remedy: str) -> Iterator[None]:
    """Within it, what the disk refuses is a RunError that names the bytes that `place` needs and those that are free.

    A full disk is an OSError to some writers and a RuntimeError or SafetensorError to others.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error) is not None:
            raise
        free = shutil.disk_usage(next(path for path in place.parents if path.exists())).free
        raise RunError(
            f"{place} could not be written: {error} ({num_bytes:,} bytes needed, {free:,} free); {remedy}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)


def sync(path: Path) -> None:
    """Bring a file or folder onto the disk: a rename must not overtake what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
