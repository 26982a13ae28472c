"""A base in 4 or 8 bits: how it is loaded, what it requires, and its memory.

4 bits are NF4 with double quantisation (QLoRA, Dettmers et al. 2023), 8 bits are LLM.int8 (Dettmers et al.
2022), both by bitsandbytes. Its layers compute x Wᵀ themselves; the adapters beside them stay in the
precision of the run.
"""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chorus.config.model import ModelSettings
from chorus.errors import InputError
from chorus.model.targets import LINEAR

logger = logging.getLogger(__name__)

QUANTISING = ("load_in_4bit", "load_in_8bit")  # keys; at most one is true
BLOCK = 64  # weights of one block of NF4, with one scale of 8 bits; 256 scales share one of 32
SHARED = 256


def quantisation_of(settings: ModelSettings, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """transformers' configuration to quantise the weights while reading them; None: no quantisation.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    check_asked_quantisation(settings)
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return None
    if settings.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantisation_of_run(
    config: Mapping[str, Any], base: PretrainedConfig, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """How a finished run quantised its base, to load it again.

    None: it did not, the base is saved quantised itself, or bitsandbytes is not installed, which is said: the
    adapters go with the weights as they are, too.

    Args:
        config: of the run; empty where there is none.
        base: of the base as it is now.
    """
    key = next((key for key in QUANTISING if config.get(key)), None)
    if key is None or saved_quantisation(base) is not None:
        return None
    if find_spec("bitsandbytes") is None:
        logger.warning(
            "the agents were trained with %s; without the package bitsandbytes the base is loaded as it is: "
            "scores differ a little from the run's own, and it takes more memory; "
            "pip install 'chorus[quantised]'",
            key,
        )
        return None
    return quantisation_of(ModelSettings.model_validate({key: True}), dtype)


def check_asked_quantisation(settings: ModelSettings) -> None:
    """Raise InputError where weights are to be quantised and bitsandbytes is not installed."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(settings, key):
            _refuse_without_package(f"key {key!r}")


def check_saved_quantisation(config: PretrainedConfig, model_name: str, asked_for: bool) -> None:
    """Check how the base was saved, before any weight is read.

    Raises:
        InputError: quantised in a way that Chorus does not support, that needs a missing package, or that
            contradicts another key.
    """
    saved = saved_quantisation(config)
    if saved is None:
        return
    method = str(saved.get("quant_method", "unknown")).rpartition(".")[2].lower()
    if method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        raise InputError(
            f"key 'model_name': {model_name} was saved quantised ({method}), which Chorus cannot train "
            "over; name the base that it was made from, with load_in_4bit=true for as little memory"
        )
    if asked_for:
        raise InputError(
            f"key 'model_name': {model_name} was saved quantised; set load_in_4bit and load_in_8bit to false"
        )
    _refuse_without_package(f"key 'model_name': {model_name}")


def saved_quantisation(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """`quantization_config` of a base that was saved quantised."""
    saved = getattr(config, "quantization_config", None)
    return saved if saved is None or isinstance(saved, Mapping) else saved.to_dict()


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a CPU's AVX-512, which it does at the first
    evaluation.

    Its product with packed weights has no backward pass: training would continue with wrong gradients and no
    error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def bits_of_base(settings: ModelSettings, config: PretrainedConfig) -> int | None:
    """4, 8, or None for a base in the precision of the run."""
    saved = saved_quantisation(config) or {}
    if settings.load_in_4bit or saved.get("load_in_4bit"):
        return 4
    return 8 if settings.load_in_8bit or saved.get("load_in_8bit") else None


def spared_bytes(model: PreTrainedModel, bits: int | None) -> tuple[int, int]:
    """The bytes that quantisation saves, and those of the largest weight once dequantised in a pass.

    Args:
        model: not quantised, on any device: all its linear layers will be, but the head.
    """
    if bits is None:
        return 0, 0
    head = model.get_output_embeddings()
    linears = [one for one in model.modules() if type(one) in LINEAR and one is not head]
    weights = [cast(torch.Tensor, one.weight.T if isinstance(one, Conv1D) else one.weight) for one in linears]
    spared = sum(weight.nbytes - _stored_bytes(weight, bits) for weight in weights)
    return spared, max((weight.nbytes for weight in weights), default=0)


def _stored_bytes(weight_OI: torch.Tensor, bits: int) -> int:
    if bits == 8:
        return weight_OI.numel() + 4 * len(weight_OI)  # a scale in fp32 for each output
    blocks = -(-weight_OI.numel() // BLOCK)
    return weight_OI.numel() // 2 + blocks + 4 * -(-blocks // SHARED)


def _refuse_without_package(what: str) -> None:
    if find_spec("bitsandbytes") is None:
        raise InputError(f"{what} needs the package bitsandbytes; pip install bitsandbytes")
