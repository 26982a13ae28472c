"""The export of a run: ordinary PEFT adapter folders, and one file that describes the ensemble."""

import math
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chorus.checkpoint.atomic_files import disk_errors, json_text, save_tensors, sync, write_text
from chorus.checkpoint.ensemble_file import ENSEMBLE_FILE
from chorus.checkpoint.manifest import ADAPTER_FILE
from chorus.config import Config, render
from chorus.errors import InputError, RunError
from chorus.model.adapters import TensorId, adapter_name, lora_shape
from chorus.model.base import base_reference, load_skeleton
from chorus.model.targets import peft_target_modules
from chorus.progress import announced

AGAIN = "make room and run the same command again"


def refuse_non_finite(tensors: Mapping[TensorId, Tensor]) -> None:
    """Raise RunError, on every process alike, where a tensor of an adapter holds a NaN or an infinity."""
    for identity, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise RunError(
                f"agent {identity.agent}: {identity.path} ({identity.matrix}) is not finite (NaN or Inf) "
                "and was not saved; lower lr and start over with resume_from_checkpoint=null"
            )


@announced("writing the agents")
def save_ensemble(
    output_dir: Path,
    tensors: Mapping[TensorId, Tensor],
    weights: Sequence[float],
    config: Config,
    more: Mapping[str, Any],
) -> None:
    """Write `agents/agent_k/` for every agent, readable by stock PEFT, `ensemble.json` and `config.yaml`.

    Everything is written under a temporary name and then renamed, so a crash leaves no partial file. Between
    the two renames the old adapters are in `agents.old`, the new ones in `agents.new`. One process calls it.

    Args:
        tensors: every adapter tensor under its identity, fp32, on the CPU.
        weights: the mixture's, one for each agent.
        more: further entries of `ensemble.json`.

    Raises:
        RunError: the write failed, or a weight of the mixture is not finite.
    """
    _refuse_non_finite_weights(weights)
    place, new = output_dir / "agents", output_dir / "agents.new"
    with disk_errors(place, sum(tensor.nbytes for tensor in tensors.values()), AGAIN):
        shutil.rmtree(new, ignore_errors=True)
        write_adapters(new, tensors, config)
        _swap(new, place)
    write_ensemble(output_dir, weights, config, more)


def write_adapters(place: Path, tensors: Mapping[TensorId, Tensor], config: Config) -> None:
    """Write an ordinary PEFT folder `agent_k/` for every agent
    into the new folder `place`, flushed to the disk."""
    paths = dict.fromkeys(identity.path.removeprefix("base_model.model.") for identity in tensors)
    target_modules = peft_target_modules(paths, _modules_of(config.model_name), config.lora_target_modules)
    shape, base_name = lora_shape(config), base_reference(config.model_name)
    for agent in sorted({identity.agent for identity in tensors}):
        lora_config = shape.peft_config(base_name, target_modules, agent)
        lora_config.inference_mode = True  # as PEFT writes it: a loaded adapter is frozen
        lora_config.target_modules = target_modules  # PEFT holds names as a set: other bytes in every process
        folder = place / adapter_name(agent)
        folder.mkdir(parents=True)
        own = {peft_key(identity): tensor for identity, tensor in tensors.items() if identity.agent == agent}
        save_tensors(own, folder / ADAPTER_FILE, {"format": "pt"})
        lora_config.save_pretrained(str(folder))
        for file in (*folder.iterdir(), folder):
            sync(file)
    sync(place)


@cache
def _modules_of(model_name: str) -> tuple[str, ...]:
    """Paths of all modules of the base, of which the configuration alone is read, once in a process.

    None where it is no longer readable: the agents must be saved all the same.
    """
    try:
        return tuple(path for path, _ in load_skeleton(model_name).named_modules())
    except InputError:
        return ()


def write_ensemble(
    output_dir: Path, weights: Sequence[float], config: Config, more: Mapping[str, Any]
) -> None:
    """Write `ensemble.json`, which describes the mixture of the agents, and the resolved `config.yaml`.

    Raises:
        RunError: the write failed, or a weight of the mixture is not finite.
    """
    _refuse_non_finite_weights(weights)
    ensemble = {
        "agents": [f"agents/{adapter_name(agent)}" for agent in range(len(weights))],
        "weights": list(weights),
        "base_model": base_reference(config.model_name),
        "parallel_mode": config.parallel_mode,
        "config": config.model_dump(),
        **more,
    }
    for name, text in ((ENSEMBLE_FILE, json_text(ensemble)), ("config.yaml", render(config))):
        with disk_errors(output_dir / name, len(text), AGAIN):
            write_text(output_dir / name, text)


def _refuse_non_finite_weights(weights: Sequence[float]) -> None:
    for agent, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise RunError(
                f"agent {agent}: its weight in the mixture is {weight}, so its answers are not finite; "
                "lower lr, and start over with resume_from_checkpoint=null"
            )


def peft_key(identity: TensorId) -> str:
    """The tensor's name in PEFT's `adapter_model.safetensors`."""
    return f"{identity.path}.lora_{identity.matrix}.weight"


def _swap(new: Path, place: Path) -> None:
    """Put folder `new` in `place`. The old one is renamed first, because only an empty folder can be
    replaced.
    """
    old = place.with_name(place.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    sync(place.parent)
