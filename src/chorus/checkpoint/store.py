"""A checkpoint: all that a run needs to go on, in a folder that is whole or absent, and readable without pickle.

    output_dir/checkpoints/step_000200/
      agents/agent_0/ ...     ordinary PEFT adapter folders in fp32: the master weights
      optimizer.safetensors   AdamW's two moments of every adapter tensor, in fp32
      state.json              step, epoch, AdamW's step count, how it was trained, fingerprints
      MANIFEST.json           size and SHA-256 of every other file; written last

It is written under a name that no reader looks at, brought to the disk, then renamed. What a kill leaves behind under
such a name is removed by the next save.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from chorus.checkpoint.atomic_files import disk_errors, sync
from chorus.checkpoint.export import ADAPTER_FILE, refuse_non_finite, write_adapters
from chorus.collectives import on_first_process
from chorus.config import Config
from chorus.errors import InputError
from chorus.model.adapters import TensorId, adapter_name
from chorus.training.engine import Engine
from chorus.training.state import MOMENTS, TrainingState, read_state

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "MANIFEST.json"
NAME = re.compile(r"step_(\d{6,})")
REMEDY = "earlier checkpoints are whole; make room and go on with resume_from_checkpoint=auto"
HALF_DONE = ".half-done"  # ends the name of a folder that is being written or removed


class Damaged(InputError):
    """A checkpoint that is not as it was written. The message names the file."""


@dataclass
class Checkpointer:
    """Writes this run's checkpoints. `facts` are the entries of `state.json` that hold for the whole run."""

    output_dir: Path
    config: Config
    facts: dict[str, Any]

    def save(self, engine: Engine, step: int, epoch: int, skips_in_a_row: int) -> None:
        """Write the checkpoint after `step` optimiser steps. A collective call; the first process writes.

        Args:
            skips_in_a_row: how many of the last steps, without a gap, skipped an agent's update.

        Raises:
            RunError: on every process alike: it could not be written, or a number in it is none.
        """
        state = read_state(engine)
        for tensors in (state.weights, *state.moments.values()):
            refuse_non_finite(tensors)
        done = {"format": FORMAT, "step": step, "epoch": epoch, "optimizer_step": state.optimizer_step}
        facts = {**done, **self.facts, "skips_in_a_row": skips_in_a_row}
        folder = on_first_process(
            engine.accelerator, lambda: write_checkpoint(self.output_dir, state, facts, self.config)
        )
        logger.info("saved %s", folder)


def write_checkpoint(output_dir: Path, state: TrainingState, facts: Mapping[str, Any], config: Config) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `save_total_limit`, but not the best one.

    One process calls it.

    Raises:
        RunError: the disk did not take it; earlier checkpoints are as they were.
    """
    folder = output_dir / "checkpoints" / f"step_{facts['step']:06d}"
    half_done = folder.with_name(folder.name + HALF_DONE)
    num_bytes = sum(
        tensor.nbytes for tensors in (state.weights, *state.moments.values()) for tensor in tensors.values()
    )
    with disk_errors(folder, num_bytes, REMEDY):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f"*{HALF_DONE}"):
            shutil.rmtree(left)
        half_done.mkdir()
        write_adapters(half_done / "agents", state.weights, config)
        moments = {
            moment_key(name, identity): tensor for name in MOMENTS for identity, tensor in state.moments[name].items()
        }
        save_file(moments, half_done / "optimizer.safetensors")
        (half_done / "state.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for name in ("optimizer.safetensors", "state.json"):
            sync(half_done / name)
        files = sorted(str(file.relative_to(half_done)) for file in half_done.rglob("*") if file.is_file())
        (half_done / MANIFEST).write_text(_manifest(half_done, files), encoding="utf-8")
        sync(half_done / MANIFEST)
        sync(half_done)
        half_done.rename(folder)
        sync(folder.parent)
        sync(output_dir)
        _prune(output_dir, config.save_total_limit, (facts.get("best") or {}).get("step"))
    return folder


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders of finished saves, whole or damaged since, newest first."""
    place = output_dir / "checkpoints"
    if not os.path.isdir(place):  # False also for a name that is too long
        return []
    return sorted((path for path in place.iterdir() if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file with the manifest; the entries of `state.json`.

    Raises:
        Damaged: a file is missing, cannot be read or has other bytes.
        InputError: another Chorus wrote it, in a format that this one does not know.
    """
    file = folder / MANIFEST
    try:
        written = file.read_bytes().decode()
        files = json.loads(written)["files"]
        for name, of_old in files.items():
            file = folder / name
            if _size_and_digest(file) != of_old:
                raise Damaged(f"{file}: is not as it was written (size or SHA-256 differs)")
        file = folder / MANIFEST
        if written != _render(files):  # a byte that changes nothing it says
            raise Damaged(f"{file}: is not as it was written")
    except OSError as error:
        raise Damaged(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{file}: is not as it was written") from error
    facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if facts["format"] != FORMAT:
        raise InputError(f"{folder}: has format {facts['format']}, and this Chorus reads {FORMAT}; use one that fits")
    return facts


def read_tensors(folder: Path, optimizer_step: int) -> TrainingState:
    """The tensors of a checkpoint that has been verified, on the CPU."""
    weights: dict[TensorId, Tensor] = {}
    for agent in range(len(list((folder / "agents").iterdir()))):
        for key, tensor in load_file(folder / "agents" / adapter_name(agent) / ADAPTER_FILE).items():
            path, _, matrix = key.removesuffix(".weight").rpartition(".lora_")
            weights[TensorId(agent, path, "A" if matrix == "A" else "B")] = tensor
    values = load_file(folder / "optimizer.safetensors")
    moments = {name: {identity: values[moment_key(name, identity)] for identity in weights} for name in MOMENTS}
    return TrainingState(weights, moments, optimizer_step)


def moment_key(name: str, identity: TensorId) -> str:
    """A moment's name in `optimizer.safetensors`, such as `exp_avg/0/base_model.model.x/A`."""
    return "/".join(map(str, (name, *identity)))


def set_aside_later(output_dir: Path, step: int) -> None:
    """Move checkpoints beyond `step` out of the way of a run that goes on from there, into `checkpoints/set_aside/`.

    They are damaged, or of the run that the user has taken back. Nothing is deleted.
    """
    for folder in checkpoints(output_dir):
        if step_of(folder) > step:
            place = folder.parent / "set_aside"
            place.mkdir(exist_ok=True)
            names = chain([folder.name], (f"{folder.name}.{number}" for number in count(1)))
            folder.rename(next(place / name for name in names if not (place / name).exists()))


def _prune(output_dir: Path, limit: int | None, best_step: int | None) -> None:
    beyond = checkpoints(output_dir)[limit:] if limit is not None else []
    for folder in (one for one in beyond if step_of(one) != best_step):
        condemned = folder.with_name(folder.name + HALF_DONE)
        folder.rename(condemned)  # a checkpoint that is half removed must not look like a damaged one
        shutil.rmtree(condemned)


def _manifest(folder: Path, files: list[str]) -> str:
    return _render({name: _size_and_digest(folder / name) for name in files})


def _render(files: Mapping[str, Any]) -> str:
    return json.dumps({"files": files}, indent=2) + "\n"


def _size_and_digest(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"size": stream.tell(), "sha256": digest}
