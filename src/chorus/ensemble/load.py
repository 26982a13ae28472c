"""An ensemble from disk: from a run, a checkpoint, or PEFT LoRA folders of any tool over one base."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chorus.checkpoint.fingerprints import base_fingerprint
from chorus.checkpoint.manifest import ADAPTER_CONFIG
from chorus.checkpoint.peft_config import read_config
from chorus.checkpoint.state_file import read_state_file
from chorus.checkpoint.store import MANIFEST, checkpoints, verify
from chorus.checkpoint.untrusted_files import Damaged
from chorus.ensemble.adapter_files import AdapterFile, read_adapter
from chorus.ensemble.lanes import lanes_of
from chorus.ensemble.mixture import Mixture
from chorus.ensemble.scoring import hidden_states
from chorus.errors import InputError
from chorus.model.adapters import LoraShape, lora_layers
from chorus.model.agents import Agents, Mode, build_agents
from chorus.model.base import load_model, load_skeleton, load_tokenizer
from chorus.model.flat_adapter import Matrix
from chorus.model.quantisation import QUANTISING, quantisation_of_run
from chorus.model.regularisation import Regularisation
from chorus.progress import announced

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."
EQUAL = 1e-6  # two adapters with a smaller relative difference of outputs count as equal


@dataclass(frozen=True)
class Ensemble:
    """K agents over one base, ready to answer.

    Attributes:
        agents: in evaluation mode.
        tokenizer: the base's.
        names: of the agents, in order.
        weights: of the mixture, summing to 1.
        temperature: of the mixture, after pooling.
        base_name: a folder or a hub id.
        description: `ensemble.json` of the run, or `state.json` of the checkpoint; empty for PEFT folders.
    """

    agents: Agents
    tokenizer: PreTrainedTokenizerBase
    names: tuple[str, ...]
    weights: tuple[float, ...]
    temperature: float
    base_name: str
    description: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """What the paths hold, before tensors are read.

    Attributes:
        folders: PEFT LoRA folders, in the agents' order.
        base_name: of a run or a checkpoint; PEFT folders name it themselves, see `base_of`.
        base_fingerprint: of the base that the agents were trained over, where it is known.
        mixture: weights and temperature.
        description: `ensemble.json` of the run, or `state.json` of the checkpoint; empty for PEFT folders.
    """

    folders: list[Path]
    mixture: Mixture
    base_name: str | None = None
    base_fingerprint: str | None = None
    description: Mapping[str, Any] = field(default_factory=dict)


def load_ensemble(
    paths: str | Path | Sequence[str | Path],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
    attn_implementation: str = "auto",
    base_option: str = "base=BASE",
) -> Ensemble:
    """Load agents and their mixture.

    Args:
        paths: a finished `output_dir`, a checkpoint's folder, a folder of PEFT LoRA folders, or a list of
            them. The adapters may differ in rank, scaling and target modules.
        device: where base and adapters go.
        dtype: of the base's weights.
        base: a folder or hub id in place of the one that the adapters name, such as its local copy.
        attn_implementation: as the key of that name.
        base_option: how the caller's user names another base, for errors.

    Raises:
        InputError: no such device; no adapters; adapters of different bases, of another base than the one
            that is there, of an unsupported kind, incomplete or not finite; an agent that equals another or
            the base.
    """
    _refuse_no_device(device)
    source = find_source([Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths])
    base_name = base or base_of(source, base_option)
    if base and source.base_name and base != source.base_name:
        logger.warning("the base is %s, in place of %s that the adapters name", base, source.base_name)
    skeleton = _skeleton(base_name, base, base_option)
    with announced("reading the adapters"):
        adapters = [read_adapter(folder, skeleton) for folder in source.folders]
        names = names_of(source.folders)
        refuse_equal_agents(adapters, names)
    tokenizer = load_tokenizer(base_name)
    quantisation = quantisation_of_run(source.description.get("config") or {}, skeleton.config, dtype)
    model = load_model(base_name, dtype, torch.device(device), attn_implementation, quantisation=quantisation)
    _check_same_base(model, source, base_name, base_option)
    agents, mixture = _build(model, adapters), source.mixture
    about = (names, mixture.weights, mixture.temperature, base_name, source.description)
    return Ensemble(agents, tokenizer, *about)


def _check_same_base(model: PreTrainedModel, source: Source, base_name: str, base_option: str) -> None:
    """Refuse another base than the run's; warn where it was quantised, as that differs between devices."""
    if source.base_fingerprint is None or base_fingerprint(model) == source.base_fingerprint:
        return
    if any((source.description.get("config") or {}).get(key) for key in QUANTISING):
        logger.warning("%s has other weights than the base of training, which was quantised", base_name)
        return
    raise InputError(
        f"{base_name}: its weights or architecture differ from those the agents were trained on; restore it, "
        f"or name its new place with {base_option}"
    )


def _refuse_no_device(device: torch.device | str) -> None:
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each kind of device has its own
        why = str(error).partition("\n")[0][:120]
        raise InputError(
            f"device {device}: cannot be used ({why}); name cpu, or cuda where there is one"
        ) from error


def _skeleton(base_name: str, base: str | None, base_option: str) -> PreTrainedModel:
    try:
        return load_skeleton(base_name)
    except InputError as error:
        if base is not None:
            raise
        raise InputError(f"{error}; the adapters name it: if it has moved, add {base_option}") from error


def find_source(paths: Sequence[Path]) -> Source:
    """Find the adapters of a finished `output_dir`, a checkpoint, or PEFT LoRA folders.

    Raises:
        InputError: nothing of that kind is there, or the checkpoint is damaged.
    """
    if not paths:
        raise InputError("no folder is named; name a run's output_dir, a checkpoint or PEFT LoRA folders")
    for path in paths:
        if not path.is_dir():
            raise InputError(
                f"{path}: no such folder; name a run's output_dir, a checkpoint or a PEFT LoRA folder"
            )
    if len(paths) == 1 and (paths[0] / "ensemble.json").is_file():
        return _of_run(paths[0])
    if len(paths) == 1 and (paths[0] / MANIFEST).is_file():
        try:
            verify(paths[0])
            saved = read_state_file(paths[0])
        except Damaged as error:
            raise InputError(f"{error}; name another checkpoint, or the run's output_dir") from error
        folders = _adapters_in(paths[0] / "agents")
        mixture, base_name = Mixture.uniform(len(folders)), saved.config.model_name
        return Source(folders, mixture, base_name, saved.fingerprints.base, saved.model_dump())
    folders = [folder for path in paths for folder in _adapters_in(path)]
    return Source(folders, Mixture.uniform(len(folders)))


def _of_run(run: Path) -> Source:
    file = run / "ensemble.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        folders = [run / name for name in entries["agents"]]
        base_name = entries["base_model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: cannot be read as the description of an ensemble; name {run / 'agents'} instead"
        ) from error
    mixture = Mixture.from_json(entries, len(folders), str(file))
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                f"{file}: names {folder}, which is not there; restore it, or name {run / 'agents'} instead"
            )
    fingerprint = None
    for folder in checkpoints(run)[:1]:
        with suppress(InputError):  # damaged: the agents are in other files, which may be intact
            fingerprint = read_state_file(folder).fingerprints.base
    return Source(folders, mixture, base_name, fingerprint, entries)


def _adapters_in(path: Path) -> list[Path]:
    """The folder itself, or the adapters' folders in it, in the order of the numbers in their names."""
    if (path / ADAPTER_CONFIG).is_file():
        return [path]
    folders = (
        [folder for folder in path.iterdir() if (folder / ADAPTER_CONFIG).is_file()] if path.is_dir() else []
    )
    if not folders:
        raise InputError(
            f"{path}: holds no adapters; name a run's output_dir, a checkpoint or PEFT LoRA folders"
        )
    return sorted(
        folders, key=lambda folder: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", folder.name)]
    )


def base_of(source: Source, base_option: str) -> str:
    """The base that the agents were trained over: a folder or a hub id.

    Args:
        base_option: how the user names one, for errors.

    Raises:
        InputError: PEFT folders name none, or not the same one.
    """
    if source.base_name is not None:
        return source.base_name
    named = {folder: read_config(folder).base_model_name_or_path for folder in source.folders}
    (first, name), *others = named.items()
    if not name:
        raise InputError(f"{first}: names no base (base_model_name_or_path); add {base_option}")
    for folder, other in others:
        if other != name:
            raise InputError(
                f"{folder}: is of base {other}, but {first} of {name}; name folders of one base, or if these "
                f"are one, add {base_option}"
            )
    return name


def names_of(folders: Sequence[Path]) -> tuple[str, ...]:
    """The folders' own names if they are distinct, otherwise their paths."""
    short = [folder.resolve().name for folder in folders]
    return tuple(short if len(set(short)) == len(short) else map(str, folders))


def refuse_equal_agents(adapters: Sequence[AdapterFile], names: Sequence[str]) -> None:
    """Compare the adapters' contributions to the outputs of their layers, on one random input for each layer.

    Raises:
        InputError: an adapter adds nothing, so that its agent is the base, or two add the same.
    """
    layers = sorted({layer for adapter in adapters for layer in adapter.matrices})
    outputs = [_probe(adapter, layers) for adapter in adapters]
    for k, (adapter, output) in enumerate(zip(adapters, outputs, strict=True)):
        if not any(bool(part.any()) for part in output.values()):
            raise InputError(
                f"{adapter.folder}: the adapter adds nothing, so it answers as the base; train it first"
            )
        for other in range(k):
            size = sum(float(part.square().sum()) for part in output.values()) ** 0.5
            apart = sum(_apart(output.get(layer), outputs[other].get(layer)) for layer in layers) ** 0.5
            if apart <= EQUAL * size:
                raise InputError(
                    f"{adapter.folder}: is the same agent as {adapters[other].folder} ({names[other]}); "
                    "leave one of them out"
                )


def _probe(adapter: AdapterFile, layers: Sequence[str]) -> dict[str, Tensor]:
    outputs = {}
    for number, layer in enumerate(layers):
        if layer in adapter.matrices:
            A_RI, B_OR = (matrix.float() for matrix in adapter.matrices[layer])
            input_I = torch.randn(A_RI.shape[1], generator=torch.Generator().manual_seed(number))
            outputs[layer] = adapter.scaling[layer] * (B_OR @ (A_RI @ input_I))
    return outputs


def _apart(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        there = one if other is None else other
        return 0.0 if there is None else float(there.square().sum())
    return float((one - other).square().sum())


@announced("building the agents")
def _build(model: PreTrainedModel, adapters: Sequence[AdapterFile]) -> Agents:
    """Agents with the largest rank and the union of all adapters' layers, padded with zeros.

    Fused, or parallel where the base mixes the rows of a batch, as experts that carry adapters do.
    """
    agents = _agents(model, adapters, "fused")
    two_groups, ids_BT = lanes_of(agents, [0, 0]), torch.ones(1, 4, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            hidden_states(agents, two_groups, ids_BT)
    except InputError:
        logger.info("the base tells the agents' rows apart only one agent at a time: parallel agents")
        return _agents(agents.peft_models[0].unload(), adapters, "parallel")  # pyright: ignore
    return agents


def _agents(model: PreTrainedModel, adapters: Sequence[AdapterFile], mode: Mode) -> Agents:
    layers = {layer for adapter in adapters for layer in adapter.matrices}
    rank = max(len(A_RI) for adapter in adapters for A_RI, _ in adapter.matrices.values())
    shape = LoraShape(rank=rank, alpha=rank, target_modules=sorted(layers), random_init=False, seed=0)
    agents = build_agents(mode, model, len(adapters), shape, Regularisation(0, 0, 0))
    scaling = {layer: _common_scaling(layer, adapters) for layer in layers}
    for peft_model in agents.peft_models:
        for path, layer in lora_layers(peft_model).items():
            layer.scaling = dict.fromkeys(layer.scaling, scaling[path.removeprefix(PEFT_PREFIX)])
    if {path.removeprefix(PEFT_PREFIX) for path, _ in agents.layout.shapes} != layers:
        raise InputError(
            "some layers with an adapter are not reached by text; train on layers of the text model alone"
        )
    for adapter, adapter_F in zip(adapters, agents.adapters().values(), strict=True):
        own = {key: _padded(adapter, key, size, scaling) for key, size in agents.layout.shapes.items()}
        adapter_F.data.copy_(agents.layout.join(own))
    return agents.eval().requires_grad_(False)


def _common_scaling(layer: str, adapters: Sequence[AdapterFile]) -> float:
    """The scaling of all agents on this layer; 1 where they differ, and each agent's scaling is in its B."""
    found = {adapter.scaling[layer] for adapter in adapters if layer in adapter.scaling}
    return found.pop() if len(found) == 1 else 1.0


def _padded(adapter: AdapterFile, key: Matrix, shape: torch.Size, scaling: Mapping[str, float]) -> Tensor:
    """fp32 A or B of one layer with zeros up to the common
    rank; zeros where the adapter has no such layer."""
    path, letter = key
    layer = path.removeprefix(PEFT_PREFIX)
    if layer not in adapter.matrices:
        return torch.zeros(shape)
    A_RI, B_OR = (matrix.float() for matrix in adapter.matrices[layer])
    if letter == "A":
        return pad(A_RI, (0, 0, 0, shape[0] - A_RI.shape[0]))
    # Equal scalings leave B unchanged; a ratio that is a power of two is exact, too.
    return pad(B_OR * (adapter.scaling[layer] / scaling[layer]), (0, shape[1] - B_OR.shape[1]))
