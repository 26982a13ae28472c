"""Agents that start from existing adapters (`init_adapters_from`): their weights and a new optimizer."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chorus.checkpoint.export import peft_key
from chorus.checkpoint.manifest import ADAPTER_FILE
from chorus.checkpoint.peft_config import read_config
from chorus.collectives import on_every_process
from chorus.config import RunConfig
from chorus.config.per_agent import of_agent
from chorus.errors import InputError
from chorus.model.agents import Agents
from chorus.model.base import base_reference

logger = logging.getLogger(__name__)

PATTERNS = ("rank_pattern", "alpha_pattern")  # Chorus answers with them, and trains one rank on all layers


def initial_folders(config: RunConfig) -> list[Path]:
    """The folder that each agent starts from, in the agents' order; empty without `init_adapters_from`.

    Raises:
        InputError: no such folders, another number of them than agents, or adapters of another shape than the
        run's.
    """
    wanted = config.init_adapters_from
    if wanted is None:
        return []
    folders = [Path(one) for one in ([wanted] if isinstance(wanted, str) else wanted)]
    if len(folders) == 1 and (folders[0] / "agents").is_dir():
        found = (folders[0] / "agents").glob("agent_*")
        folders = sorted(found, key=lambda folder: (len(folder.name), folder.name))
    for folder in folders:
        if folder.resolve().is_relative_to(Path(config.output_dir).resolve()):
            _refuse(f"{folder} lies in output_dir, which a fresh start sets aside; name another output_dir")
    configs = [_read_config(folder) for folder in folders]
    if len(folders) != config.num_agents:
        _refuse(
            f"names {len(folders)} adapters, and num_agents is {config.num_agents}; set "
            f"num_agents={len(folders)}"
        )
    _refuse_another_shape(folders, configs, config)
    return folders


def start_from(agents: Agents, folders: Sequence[Path]) -> None:
    """Load the weights of each folder into its agent; does nothing without folders. A collective call.

    Raises:
        InputError: on every process alike: an adapter lacks a layer of the run's, has one more, or is not
            finite.
    """
    if folders:  # processes may hold other agents, and so read other files
        on_every_process(lambda: _start_own(agents, folders))
        # Read once more: no log was open when `initial_folders` read them.
        _tell_another_base(folders, base_reference(str(agents.config.name_or_path)))


def _start_own(agents: Agents, folders: Sequence[Path]) -> None:
    tensors = agents.adapter_tensors()
    for agent in agents.agents:
        file = folders[agent] / ADAPTER_FILE
        wanted = {
            peft_key(identity): tensor for identity, tensor in tensors.items() if identity.agent == agent
        }
        _fill(wanted, _read(file), file)


def _tell_another_base(folders: Sequence[Path], base: str) -> None:
    """Log the bases that the adapters name, where they are not this one: it may have moved."""
    named = {read_config(folder).base_model_name_or_path for folder in folders}
    others = sorted(base_reference(name) for name in named if name and base_reference(name) != base)
    if others:
        logger.warning(
            "init_adapters_from: the adapters were trained over %s, and start over %s; if these are not one "
            "model, set model_name to theirs",
            *(", ".join(others), base),
        )


def _read_config(folder: Path) -> LoraConfig:
    """PEFT's configuration of a plain LoRA adapter."""
    try:
        peft = read_config(folder)
    except InputError as error:
        _refuse(f"{error}; name a run's output_dir, or a list of plain PEFT LoRA folders", error)
    for key in PATTERNS:
        if getattr(peft, key):
            _refuse(f"{folder} has {key}, which Chorus does not train; name plain LoRA adapters")
    return peft


def _refuse_another_shape(folders: Sequence[Path], configs: Sequence[LoraConfig], config: RunConfig) -> None:
    """Refuse adapters whose shape differs from the agents'. Each agent starts from one folder."""
    alphas = [peft.lora_alpha for peft in configs]
    for agent, (folder, peft) in enumerate(zip(folders, configs, strict=True)):
        alpha = of_agent(config.lora_alpha, agent)
        ours = {"r": config.lora_rank, "lora_alpha": alpha, "use_rslora": config.use_rslora}
        for key, wanted in ours.items():
            found = getattr(peft, key)
            if found != wanted:
                name = "lora_rank" if key == "r" else key
                needed = alphas if key == "lora_alpha" and len(set(map(str, alphas))) > 1 else found
                _refuse(f"{folder} has {key} {found}; set {name}={str(needed).lower()}")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        _refuse(f"{file} cannot be read: {error}; save or copy it again", error)


@torch.no_grad()
def _fill(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    for key in wanted.keys() ^ found.keys():
        has = "lacks" if key in wanted else "has, and this run has not,"
        _refuse(f"{file} {has} {key}; set lora_target_modules as its run had it")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            _refuse(
                f"{file}: {key} has shape {list(found[key].shape)}, and this base wants "
                f"{list(tensor.shape)}; set model_name to the base that it was trained on"
            )
        if not bool(torch.isfinite(found[key]).all()):
            _refuse(f"{file}: {key} holds a NaN or an infinity; take an earlier save")
        tensor.copy_(found[key])


def _refuse(what: str, error: Exception | None = None) -> NoReturn:
    raise InputError(f"key 'init_adapters_from': {what}") from error
