"""Small files written whole or not at all, JSON that any reader accepts, and the errors of a full disk."""

import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from chorus.errors import RunError, out_of_memory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: an error without a number


@contextmanager
def disk_errors(place: Path, num_bytes: int, remedy: str) -> Iterator[None]:
    """Turn a write error into a RunError. On a full disk it names the bytes that `place` needs and those that
    are free.

    Some writers raise an OSError on a full disk, others a RuntimeError or SafetensorError.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error) is not None:
            raise
        if isinstance(error, OSError) and error.errno not in FULL:
            other = remedy.replace("make room", "correct that")
            raise RunError(f"{place} could not be written: {error.strerror}; {other}") from error
        free = shutil.disk_usage(next(path for path in place.parents if path.exists())).free
        raise RunError(
            f"{place} could not be written: {error} ({num_bytes:,} bytes needed, {free:,} free); {remedy}"
        ) from error


def json_text(value: Any) -> str:
    """`value` as indented JSON. JSON has no NaN and no infinity: null stands for them."""
    return json.dumps(finite_or_null(value), indent=2, allow_nan=False) + "\n"


def json_lines(values: Iterable[Any]) -> str:
    """A line of JSON for each value, with null for non-finite numbers."""
    lines = (
        json.dumps(finite_or_null(value), ensure_ascii=False, allow_nan=False) + "\n" for value in values
    )
    return "".join(lines)


def finite_or_null(value: Any) -> Any:
    """`value` with None for every non-finite float in it."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, readable by everyone who may read its folder."""
    save_file(dict(tensors), path, metadata=metadata)
    share(path)


def share(path: Path) -> None:
    """Make a file readable by everyone who may read its folder: safetensors leaves it to its owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk. Without it a rename may reach the disk before the data it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
