"""The configuration of a PEFT LoRA folder: what Chorus reads of it, and what it refuses.

PEFT has many extensions of LoRA. A reader that ignored one would compute another function, with no error.
"""

import dataclasses
import json
from pathlib import Path

from peft import LoraConfig

from chorus.checkpoint.manifest import ADAPTER_CONFIG
from chorus.errors import InputError, first_line

# Fields of PEFT's LoraConfig that Chorus applies, or that have no effect after training. A folder that
# sets any other field is refused: it would silently be ignored.
APPLIED = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "base_model_name_or_path",
    "peft_type",
}
APPLIED |= {"fan_in_fan_out", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "eva_config",
}
HARMLESS |= {"init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config"}
# Initialisations that change the base's own weights, so that the stock base is another model.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(folder: Path) -> LoraConfig:
    """The LoRA configuration of a folder.

    Raises:
        InputError: the folder has none, or one of another kind of adapter.
    """
    file = folder / ADAPTER_CONFIG
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: holds no {ADAPTER_CONFIG}; name a folder that PEFT has saved") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON; export the adapter again") from error
    if not isinstance(entries, dict) or entries.get("peft_type") != "LORA":
        kind = entries.get("peft_type") if isinstance(entries, dict) else type(entries).__name__
        raise InputError(f"{file}: peft_type is {kind}, not LORA; only LoRA adapters can be loaded")
    defaults = {field.name: getattr(LoraConfig(), field.name) for field in dataclasses.fields(LoraConfig)}
    for name, value in entries.items():
        is_off = value == defaults.get(name) or value in (None, False, [], {})
        if name not in APPLIED | HARMLESS and not is_off:
            raise InputError(
                f"{file}: {name} is {value!r}, which Chorus does not support; merge or retrain without it"
            )
    start = entries.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE):
        raise InputError(
            f"{file}: init_lora_weights is {start!r}, which changes the base's weights; convert it to a "
            "plain LoRA adapter with PEFT first"
        )
    rank = entries.get("r", defaults["r"])
    if type(rank) is not int or rank < 1:
        raise InputError(f"{file}: r is {rank!r}, no whole number above 0; give the rank of the tensors")
    known = {name: value for name, value in entries.items() if name in APPLIED}
    known.pop("peft_type")
    try:
        return LoraConfig(**known)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: {first_line(error)}; export the adapter again") from error
