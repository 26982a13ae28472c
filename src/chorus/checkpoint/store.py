"""A checkpoint: all that a run needs to resume, in a folder that is complete or absent, readable without
pickle.

    output_dir/checkpoints/step_000200/
      agents/agent_0/ ...     ordinary PEFT adapter folders in fp32: the master weights
      optimizer.safetensors   AdamW's two moments of every adapter tensor, in fp32
      state.json              step, epoch, AdamW's step count, how it was trained, fingerprints
      MANIFEST.json           size and SHA-256 of every other file; written last

It is written under a temporary name, flushed to the disk, then renamed. The next save removes what a killed
save has left under such a name.
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chorus.checkpoint.atomic_files import disk_errors, json_text, save_tensors, sync
from chorus.checkpoint.export import refuse_non_finite, write_adapters
from chorus.checkpoint.manifest import (
    ADAPTER_FILE,
    MANIFEST,
    MOMENTS_FILE,
    num_agents_of,
    read_manifest,
    verify_files,
    write_manifest,
)
from chorus.checkpoint.state_file import FORMAT, STATE_FILE, SavedStep, read_saved_step
from chorus.checkpoint.untrusted_files import Damaged
from chorus.collectives import on_first_process
from chorus.config import Config
from chorus.errors import InputError
from chorus.model.adapters import TensorId, adapter_name
from chorus.training.engine import Engine
from chorus.training.state import MOMENTS, TrainingState, read_state

logger = logging.getLogger(__name__)

NAME = re.compile(r"step_\d{6,18}", re.ASCII)
REMEDY = "earlier checkpoints are whole; make room, then resume with resume_from_checkpoint=auto"
HALF_DONE = ".half-done"  # suffix of a folder that is being written or removed


@dataclass
class Checkpointer:
    """Writes this run's checkpoints. `facts` are the constant entries of `state.json`."""

    output_dir: Path
    config: Config
    facts: dict[str, Any]

    def save(
        self,
        engine: Engine,
        step: int,
        epoch: int,
        skips_in_a_row: int,
        scores: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the checkpoint after `step` optimiser steps. A collective call; the first process writes.

        Args:
            skips_in_a_row: number of consecutive steps, up to this one, in which some agent's update was
                skipped.
            scores: the entries that say what was scored: `best`, `initial_scores`, `stopped_early`,
                `evaluation_due`.

        Raises:
            RunError: on every process alike: the write failed, or a value is not finite.
        """
        state = read_state(engine)
        for tensors in (state.weights, *state.moments.values()):
            refuse_non_finite(tensors)
        done = {"format": FORMAT, "step": step, "epoch": epoch, "optimizer_step": state.optimizer_step}
        facts = {**done, **self.facts, "skips_in_a_row": skips_in_a_row, **(scores or {})}
        folder = on_first_process(
            engine.accelerator, lambda: write_checkpoint(self.output_dir, state, facts, self.config)
        )
        logger.info("saved %s", folder)


def write_checkpoint(
    output_dir: Path, state: TrainingState, facts: Mapping[str, Any], config: Config
) -> Path:
    """Write a checkpoint, then remove the oldest ones beyond `save_total_limit`, but not the best one.

    One process calls it.

    Raises:
        RunError: the write failed; earlier checkpoints are as they were.
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
            moment_key(name, identity): tensor
            for name in MOMENTS
            for identity, tensor in state.moments[name].items()
        }
        save_tensors(moments, half_done / MOMENTS_FILE)
        (half_done / STATE_FILE).write_text(json_text(facts), encoding="utf-8")
        write_manifest(half_done, len({identity.agent for identity in state.weights}))
        for name in (MOMENTS_FILE, STATE_FILE, MANIFEST, "."):
            sync(half_done / name)
        half_done.rename(folder)
        sync(folder.parent)
        sync(output_dir)
        _prune(output_dir, config.save_total_limit, (facts.get("best") or {}).get("step"))
    return folder


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders of finished saves, newest first. They may have been damaged since."""
    place = output_dir / "checkpoints"
    if not os.path.isdir(place):  # False also for a name that is too long
        return []
    try:
        return sorted(
            (path for path in place.iterdir() if NAME.fullmatch(path.name)), key=step_of, reverse=True
        )
    except OSError as error:
        raise InputError(
            f"{place}: cannot be read ({error.strerror}); let the user of this run read it"
        ) from error


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def verify(folder: Path) -> SavedStep:
    """Compare every file with the manifest; returns the progress of the run.

    Raises:
        Damaged: a file is missing, unreadable, changed, or has content that no run writes.
        InputError: the checkpoint has a format that this version does not know.
    """
    num_agents = num_agents_of(verify_files(folder))
    saved = read_saved_step(folder)
    if isinstance(saved.optimizer_step, list) and len(saved.optimizer_step) != num_agents:
        raise Damaged(
            f"{folder / STATE_FILE}: optimizer_step has {len(saved.optimizer_step)} numbers for "
            f"{num_agents} agents"
        )
    if NAME.fullmatch(folder.name) and step_of(folder) != saved.step:
        raise Damaged(
            f"{folder / STATE_FILE}: step is {saved.step}, and the folder's name says {step_of(folder)}"
        )
    return saved


def read_tensors(folder: Path, optimizer_step: int | list[int]) -> TrainingState:
    """The tensors of a checkpoint that has been verified, on the CPU.

    Raises:
        Damaged: the folder has changed since, or a file does not hold the tensors that a run saves.
    """
    weights: dict[TensorId, Tensor] = {}
    for agent in range(num_agents_of(read_manifest(folder))):
        file = folder / "agents" / adapter_name(agent) / ADAPTER_FILE
        for key, tensor in _load(file).items():
            path, _, matrix = key.removesuffix(".weight").rpartition(".lora_")
            weights[TensorId(agent, path, "A" if matrix == "A" else "B")] = tensor
    file = folder / MOMENTS_FILE
    values = _load(file)
    wanted = {moment_key(name, identity): (name, identity) for name in MOMENTS for identity in weights}
    for key in sorted(wanted.keys() ^ values.keys()):
        raise Damaged(
            f"{file}: {key[:200]!r} is {'missing' if key in wanted else 'not a moment of an adapter'}"
        )
    moments: dict[str, dict[TensorId, Tensor]] = {name: {} for name in MOMENTS}
    for key, (name, identity) in wanted.items():
        if values[key].shape != weights[identity].shape:
            raise Damaged(
                f"{file}: {key[:200]!r} has shape {[*values[key].shape]}, its weight "
                f"{[*weights[identity].shape]}"
            )
        moments[name][identity] = values[key]
    return TrainingState(weights, moments, optimizer_step)


def _load(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, which must be fp32 and finite, as a run saves them."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise Damaged(" ".join(f"{file}: cannot be read ({error})".split())) from error
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            what = "is not finite" if tensor.dtype == torch.float32 else f"is {tensor.dtype}, not float32"
            raise Damaged(f"{file}: {name[:200]!r} {what}")
    return tensors


def moment_key(name: str, identity: TensorId) -> str:
    """A moment's name in `optimizer.safetensors`, such as `exp_avg/0/base_model.model.x/A`."""
    return "/".join(map(str, (name, *identity)))


def set_aside_later(output_dir: Path, step: int) -> None:
    """Move checkpoints beyond `step` into `checkpoints/set_aside/`, before a run resumes from `step`.

    They are damaged, or the user resumes from an earlier step. Nothing is deleted.
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
        half_removed = folder.with_name(folder.name + HALF_DONE)
        folder.rename(half_removed)  # a checkpoint that is half removed must not look like a damaged one
        shutil.rmtree(half_removed)
