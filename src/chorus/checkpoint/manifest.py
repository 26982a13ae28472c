"""`MANIFEST.json` of a checkpoint: the size and SHA-256 of every other file. It is written last."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.types import NonNegativeInt

from chorus.checkpoint.state_file import STATE_FILE
from chorus.checkpoint.untrusted_files import (
    Damaged,
    UntrustedModel,
    is_incidental,
    open_regular,
    parse,
    read_bytes,
)
from chorus.model.adapters import adapter_name

MANIFEST = "MANIFEST.json"
ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's names
ADAPTER_CONFIG = "adapter_config.json"
MOMENTS_FILE = "optimizer.safetensors"
CHUNK_BYTES = 2**20


class Entry(UntrustedModel, extra="forbid"):
    """What one file held when it was written."""

    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(UntrustedModel, extra="forbid"):
    """Every other file of the checkpoint, by its path in the folder."""

    files: dict[str, Entry]


def expected_files(num_agents: int) -> list[str]:
    """The files that the manifest of a checkpoint of `num_agents` agents must list, sorted by path."""
    of_agents = (
        f"agents/{adapter_name(agent)}/{name}"
        for agent in range(num_agents)
        for name in (ADAPTER_CONFIG, ADAPTER_FILE)
    )
    return sorted([*of_agents, MOMENTS_FILE, STATE_FILE])


def write_manifest(folder: Path, num_agents: int) -> None:
    """Write `MANIFEST.json`, once all other files of the checkpoint are there."""
    entries = {name: entry_of(folder, name).model_dump() for name in expected_files(num_agents)}
    (folder / MANIFEST).write_text(_render(entries), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Size and digest of every file that the checkpoint must hold, by its path in the folder.

    Raises:
        Damaged: the manifest is not as a run writes it, or lists other files than those of a checkpoint.
    """
    file = folder / MANIFEST
    content = read_bytes(folder, MANIFEST)
    entries = parse(file, content, Manifest).files
    if content != _render({name: entry.model_dump() for name, entry in entries.items()}).encode():
        raise Damaged(f"{file}: is not as a run writes it")  # such as one space more
    expected = expected_files(max(1, num_agents_of(entries)))
    for name in sorted(entries.keys() ^ {*expected}):
        what = "does not belong to a checkpoint" if name in entries else "is missing from the list"
        raise Damaged(" ".join(f"{file}: {name[:200]!r} {what}".split()))
    return entries


def num_agents_of(entries: Mapping[str, Entry]) -> int:
    """How many agents a manifest lists."""
    return sum(name.endswith(f"/{ADAPTER_FILE}") for name in entries)


def verify_files(folder: Path) -> dict[str, Entry]:
    """Compare every file with the manifest, which is returned. Files that it does not list are not read.

    Raises:
        Damaged: as `read_manifest`, or a file is missing, was changed, or is not a regular file of this
        folder.
    """
    entries = read_manifest(folder)
    for name, entry in entries.items():
        if entry_of(folder, name, most_bytes=entry.size) != entry:
            raise Damaged(f"{folder / name}: is not as it was written (size or SHA-256 differs)")
    return entries


def entry_of(folder: Path, name: str, most_bytes: int | None = None) -> Entry:
    """Size and digest of a file. One that is longer than `most_bytes` is not read to its end."""
    digest, size = hashlib.sha256(), 0
    with open_regular(folder, name) as stream:
        try:
            while (most_bytes is None or size <= most_bytes) and (chunk := stream.read(CHUNK_BYTES)):
                digest.update(chunk)
                size += len(chunk)
        except OSError as error:
            raise Damaged(f"{folder / name}: cannot be read ({error.strerror})") from error
    return Entry(size=size, sha256=digest.hexdigest())


def unexpected_files(folder: Path, num_agents: int) -> list[str]:
    """Files in a checkpoint's folder that no run has written, apart from those of systems and editors."""
    expected = {*expected_files(num_agents), MANIFEST}
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (str(path.relative_to(folder)) for path in found if not is_incidental(path.name))
    return sorted(name for name in names if name not in expected)


def _render(entries: Mapping[str, Any]) -> str:
    return json.dumps({"files": entries}, indent=2) + "\n"
