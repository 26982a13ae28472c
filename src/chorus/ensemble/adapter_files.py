"""Stock PEFT LoRA folders: what is read from them, and what is refused.

PEFT's own loader does not report missing, renamed, partial or non-finite tensors, and a model with such an
adapter answers like the base. Here the file must hold exactly the tensors that the folder's configuration
implies.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chorus.checkpoint.manifest import ADAPTER_CONFIG, ADAPTER_FILE
from chorus.checkpoint.peft_config import read_config
from chorus.errors import InputError, first_line
from chorus.model.targets import LINEAR

PICKLED_FILE = "adapter_model.bin"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class AdapterFile:
    """One LoRA folder, read and checked against the base.

    Attributes:
        base_name: the base that the folder names, if any.
        matrices: A_RI and B_OR of every layer, by the layer's name in the base.
        scaling: of every layer.
    """

    folder: Path
    base_name: str | None
    matrices: Mapping[str, tuple[Tensor, Tensor]]
    scaling: Mapping[str, float]


def read_adapter(folder: Path, skeleton: PreTrainedModel) -> AdapterFile:
    """The adapter of a folder, checked against the base's modules, which need no weights.

    Raises:
        InputError: a tensor is missing, unknown, of another shape or not finite, or the file is not in
            safetensors format.
    """
    config, file = read_config(folder), folder / ADAPTER_FILE
    if not file.is_file():
        pickled = (
            f" ({PICKLED_FILE} may run code and is not loaded)" if (folder / PICKLED_FILE).exists() else ""
        )
        raise InputError(f"{folder}: holds no {ADAPTER_FILE}{pickled}; save the adapter as safetensors")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({first_line(error)}); copy or export it again") from error
    pairs = _pairs(file, tensors)
    linears = {
        name: _sizes(module) for name, module in skeleton.named_modules() if isinstance(module, LINEAR)
    }
    targets = _targets(config, skeleton, linears)
    _refuse_other_layers(file, set(pairs), targets, linears)
    matrices, scaling = {}, {}
    for name, found in pairs.items():
        rank = _by_pattern(config.rank_pattern, name, config.r)
        alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
        width_in, width_out = linears[name]
        for letter, shape in (("A", (rank, width_in)), ("B", (width_out, rank))):
            _check_tensor(file, f"{name}.lora_{letter}", found.get(letter), shape)
        matrices[name] = (found["A"], found["B"])
        scaling[name] = alpha / (rank**0.5 if config.use_rslora else rank)
    return AdapterFile(folder, config.base_model_name_or_path, matrices, scaling)


def _by_pattern(patterns: Mapping[str, int] | None, name: str, otherwise: int) -> int:
    """The value of the first pattern that matches a layer's name, by PEFT's rule."""
    patterns = patterns or {}
    return patterns.get(get_pattern_key(list(patterns), name), otherwise)


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """In and out features of a linear layer; GPT-2's stores its weight transposed."""
    width_out, width_in = cast(Tensor, linear.weight).shape
    return (width_out, width_in) if isinstance(linear, Conv1D) else (width_in, width_out)


def _pairs(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise InputError(
                f"{file}: tensor {key} is no lora_A or lora_B of a linear layer; export the adapter again"
            )
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise InputError(f"{file}: holds no tensor; export the adapter again")
    return pairs


def _targets(
    config: LoraConfig, skeleton: PreTrainedModel, linears: Mapping[str, tuple[int, int]]
) -> set[str]:
    """Names of the linear layers that the configuration puts an adapter on."""
    expanded = _maybe_include_all_linear_layers(config, skeleton)
    return {name for name in linears if check_target_module_exists(expanded, name)}


def _refuse_other_layers(
    file: Path, found: set[str], targets: set[str], linears: Mapping[str, tuple[int, int]]
) -> None:
    unknown = sorted(found - linears.keys())
    if unknown:
        raise InputError(
            f"{file}: the base has no linear layer {unknown[0]}; name the base that it was trained on"
        )
    missing, extra = sorted(targets - found), sorted(found - targets)
    if missing:
        raise InputError(
            f"{file}: {len(missing)} of {len(targets)} layers that {ADAPTER_CONFIG} targets have no tensor, "
            f"such as {missing[0]}; export the adapter again"
        )
    if extra:
        raise InputError(
            f"{file}: {extra[0]} is not among the target_modules of {ADAPTER_CONFIG}; export it again"
        )


def _check_tensor(file: Path, name: str, tensor: Tensor | None, shape: tuple[int, int]) -> None:
    if tensor is None:
        raise InputError(f"{file}: {name} is missing; export the adapter again")
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"{file}: {name} has shape {tuple(tensor.shape)} instead of {shape}; name the base that "
            "it was trained on"
        )
    if not tensor.is_floating_point():
        raise InputError(
            f"{file}: {name} is {tensor.dtype}, not a floating-point type; export the adapter again"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{file}: {name} is not finite (NaN or Inf); take an earlier checkpoint")
