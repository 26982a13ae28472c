"""Reading files of a run folder without trusting them.

Anyone may have edited, copied or damaged what lies in the folder. A file is read only if it is a regular file
inside that folder: a link could lead anywhere, and a FIFO or a device could block forever. JSON is checked
against a typed model, so that what the code reads has the type and the range it expects.
"""

import os
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from chorus.errors import InputError

M = TypeVar("M", bound="UntrustedModel")

MOST_JSON_BYTES = 64 * 2**20  # the largest real one, a manifest of thousands of agents, is below 2 MB
# Files that systems, editors and network file systems leave in any folder.
INCIDENTAL = (
    *(".DS_Store", "._*", ".localized", "Thumbs.db", "desktop.ini", ".directory", "lost+found"),
    *("*.swp", "*.swo", "*~", ".#*", "#*#", ".~lock.*", ".nfs*", ".fuse_hidden*", ".ipynb_checkpoints"),
)


class Damaged(InputError):
    """A file differs from what a run writes. The message names the file."""


class UntrustedModel(BaseModel):
    """What a JSON file must hold: exact types and finite numbers.
    Unknown entries are kept: later versions add some."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)


def is_incidental(name: str) -> bool:
    """Whether a file of this name was left by the system or an editor; such files are ignored."""
    return any(fnmatchcase(name, pattern) for pattern in INCIDENTAL)


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Open the regular file `folder/name` for reading. `folder` itself may be a link; nothing below it may be
    one.

    Raises:
        Damaged: it is missing, not a regular file, unreadable, or outside the folder because of a link.
    """
    file = folder / name
    try:
        if os.path.realpath(file) != os.path.join(os.path.realpath(folder), name):
            raise Damaged(
                f"{file}: is reached through a link or leads out of its folder; put the file itself there"
            )
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Damaged(f"{file}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Damaged(f"{file}: cannot be read (it is not a regular file)")
    return os.fdopen(descriptor, "rb")


def read_bytes(folder: Path, name: str) -> bytes:
    """The bytes of a small regular file.

    Raises:
        Damaged: as `open_regular`, or the file is larger than any that a run writes.
    """
    with open_regular(folder, name) as stream:
        try:
            content = stream.read(MOST_JSON_BYTES + 1)
        except OSError as error:
            raise Damaged(f"{folder / name}: cannot be read ({error.strerror})") from error
    if len(content) > MOST_JSON_BYTES:
        raise Damaged(
            f"{folder / name}: is larger than {MOST_JSON_BYTES:,} bytes, and no run writes so much there"
        )
    return content


def parse(file: Path, content: bytes | str, model: type[M]) -> M:
    """The JSON `content` of `file` as `model`.

    Raises:
        Damaged: it is not JSON, or an entry is missing, has another type or is out of range. The entry is
        named.
    """
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        entry = ".".join(map(str, first["loc"]))
        found = "" if first["type"] in ("missing", "json_invalid") else f" ({str(first['input'])[:60]!r})"
        message = first["msg"].removeprefix("Value error, ")
        what = f"entry {entry!r}{found}: {message}" if entry else message
        raise Damaged(" ".join(f"{file}: is not as a run writes it: {what}".split())) from error
