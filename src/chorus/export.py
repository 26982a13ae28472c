"""What a run leaves behind: ordinary PEFT adapter folders and one file that says how they make an ensemble."""

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from chorus.adapters import TensorId, adapter_name, lora_shape
from chorus.agreement import on_every_process, on_first_process
from chorus.config import Config, render
from chorus.errors import InputError, RunError

ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's name
AGAIN = "make room and run the same command again"
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


def refuse_non_finite(tensors: Mapping[TensorId, Tensor]) -> None:
    """Raises RunError, on every process alike, where an adapter holds a NaN or an infinity: it must not be saved."""
    for identity, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"agent {identity.agent}: {identity.path} ({identity.matrix}) is not finite and was not saved; lower lr"
            )


def save_ensemble(
    output_dir: Path,
    tensors: Mapping[TensorId, Tensor],
    weights: Sequence[float],
    config: Config,
    more: Mapping[str, Any],
) -> None:
    """Write `agents/agent_k/` for every agent, readable by stock PEFT, `ensemble.json` and `config.yaml`.

    Everything is written beside its place first and then renamed into it: a crash leaves no half-written file. Between
    two renames the older adapters are in `agents.old`, the newer in `agents.new`. One process calls it.

    Args:
        tensors: every adapter tensor under its identity, fp32, on the CPU.
        weights: the mixture's, one an agent.
        more: further entries of `ensemble.json`.

    Raises:
        RunError: the disk did not take it.
    """
    place, new = output_dir / "agents", output_dir / "agents.new"
    with disk_errors(place, sum(tensor.nbytes for tensor in tensors.values()), AGAIN):
        shutil.rmtree(new, ignore_errors=True)
        write_adapters(new, tensors, config)
        _swap(new, place)
    write_ensemble(output_dir, weights, config, more)


def write_adapters(place: Path, tensors: Mapping[TensorId, Tensor], config: Config) -> None:
    """Write an ordinary PEFT folder `agent_k/` for every agent into `place`, which is new, and bring it to the disk."""
    lora_config = lora_shape(config).peft_config(config.model_name)
    lora_config.inference_mode = True  # as PEFT writes it: loading makes no gradient
    if not isinstance(lora_config.target_modules, str):
        lora_config.target_modules = sorted(lora_config.target_modules or ())  # a set: other bytes in every process
    for agent in sorted({identity.agent for identity in tensors}):
        folder = place / adapter_name(agent)
        folder.mkdir(parents=True)
        own = {peft_key(identity): tensor for identity, tensor in tensors.items() if identity.agent == agent}
        save_file(own, folder / ADAPTER_FILE, metadata={"format": "pt"})
        lora_config.save_pretrained(str(folder))
        for file in (*folder.iterdir(), folder):
            sync(file)
    sync(place)


def write_ensemble(output_dir: Path, weights: Sequence[float], config: Config, more: Mapping[str, Any]) -> None:
    """Write `ensemble.json`, which says how the agents of `agents/` make one answer, and the resolved `config.yaml`.

    Raises:
        RunError: the disk did not take it.
    """
    ensemble = {
        "agents": [f"agents/{adapter_name(agent)}" for agent in range(len(weights))],
        "weights": list(weights),
        "base_model": config.model_name,
        "parallel_mode": config.parallel_mode,
        "config": config.model_dump(),
        **more,
    }
    for name, text in (("ensemble.json", json.dumps(ensemble, indent=2) + "\n"), ("config.yaml", render(config))):
        with disk_errors(output_dir / name, len(text), AGAIN):
            write_text(output_dir / name, text)


@contextmanager
def disk_errors(place: Path, num_bytes: int, remedy: str) -> Iterator[None]:
    """Within it, what the disk refuses is a RunError that names the bytes that `place` needs and those that are free.

    A full disk is an OSError to some writers and a RuntimeError or SafetensorError to others.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(next(path for path in place.parents if path.exists())).free
        raise RunError(
            f"{place} could not be written: {error} ({num_bytes:,} bytes needed, {free:,} free); {remedy}"
        ) from error


def peft_key(identity: TensorId) -> str:
    """The tensor's name in PEFT's `adapter_model.safetensors`."""
    return f"{identity.path}.lora_{identity.matrix}.weight"


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.replace(path)


def _swap(new: Path, place: Path) -> None:
    """Put folder `new` in `place`. A folder cannot be renamed over a full one, so the old one steps aside first."""
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    sync(place.parent)


def sync(path: Path) -> None:
    """Bring a file or folder onto the disk: a rename must not overtake what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
