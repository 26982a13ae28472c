"""The DeepSpeed JSON, the launcher and configs.yaml: merged into one configuration, or refused.

DeepSpeed silently accepts a misspelt key, prefers a number in its JSON to the script's, and reads a missing
`gradient_clipping` as 1.0. So the JSON is checked here, and the values of configs.yaml are filled in.
"""

import copy
import difflib
import json
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chorus.config.engine import EngineSettings
from chorus.config.training import TrainingSettings
from chorus.errors import InputError

KNOWN_KEYS: dict[str, type] = {  # with the type of each value
    "train_batch_size": float,
    "train_micro_batch_size_per_gpu": float,
    "gradient_accumulation_steps": float,
    "gradient_clipping": float,
    "bf16": dict,
    "fp16": dict,
    "communication_data_type": str,
    "data_types": dict,
    "zero_optimization": dict,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "disable_allgather": bool,
    "timers": dict,
    "steps_per_print": float,
    "wall_clock_breakdown": bool,
    "dump_state": bool,
    "memory_breakdown": bool,
    "comms_logger": dict,
    "flops_profiler": dict,
}
# Sections in which DeepSpeed itself takes any name, and some wrong values, without a word.
UNCHECKED: dict[str, dict[str, type]] = {
    "data_types": {"grad_accum_dtype": str},
    "timers": {"throughput": dict},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": float,
        "module_depth": float,
        "top_modules": float,
        "detailed": bool,
        "output_file": str,
    },
}
IN_WORDS = {float: "a number", str: "a text", bool: "true or false", dict: "a JSON object"}
NOT_OURS = {
    "optimizer": "the optimizer is AdamW with lr and weight_decay of configs.yaml",
    "scheduler": "the schedule is lr_scheduler_type of configs.yaml",
    "amp": "precision is mixed_precision of configs.yaml",
    "activation_checkpointing": "it is gradient_checkpointing of configs.yaml",
}
JSON = "the DeepSpeed JSON"
KEEPS_ADAMW = "keeps torch's AdamW, also where the state is on the CPU"
TAKES_NORM = "itself takes the norm that clips"
OLD_NAMES = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
BUILT_IN: dict[str, Any] = {
    # deepspeed_config_file: null. Buckets are sized to adapters: DeepSpeed's default of 5e8 elements is a
    # gigabyte.
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
}


def deepspeed_json(
    engine: EngineSettings,
    training: TrainingSettings,
    precision: str,
    num_processes: int,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """The complete DeepSpeed configuration of this run.

    Args:
        precision: "no", "fp16" or "bf16": `mixed_precision` with "auto" already decided.
        num_processes: of the run.

    Raises:
        InputError: an unreadable file, an unknown key, or a value that is not supported or contradicts
        configs.yaml.
    """
    path = _json_path(engine.deepspeed_config_file, environment)
    settings = copy.deepcopy(BUILT_IN) if path is None else _read(path)
    path = path or "the built-in DeepSpeed settings"
    for key in settings:
        if key in NOT_OURS:
            raise InputError(f"{path}: key '{key}' cannot be used: {NOT_OURS[key]}; remove it")
        if key not in KNOWN_KEYS:
            raise InputError(_unknown(path, key, KNOWN_KEYS))
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or type(stage) is not int or stage not in (1, 2, 3):  # true is not 1
        raise InputError(f"{path}: key 'zero_optimization.stage' is {stage}; give 1, 2 or 3")
    _check_zero(zero, path, environment)
    step_rows = training.batch_size * training.gradient_accumulation_steps * num_processes
    _settle(settings, "train_micro_batch_size_per_gpu", training.batch_size, path, "batch_size")
    _settle(settings, "gradient_accumulation_steps", training.gradient_accumulation_steps, path)
    _settle(
        settings, "train_batch_size", step_rows, path, "batch_size x gradient_accumulation_steps x processes"
    )
    _settle(settings, "gradient_clipping", training.max_grad_norm, path, "max_grad_norm")
    # With optimizer state on the CPU, DeepSpeed would use its own AdamW, which rounds differently.
    _decide(settings, "zero_force_ds_cpu_optimizer", path, KEEPS_ADAMW)
    for name in ("bf16", "fp16"):
        section = settings.setdefault(name, {})
        if not isinstance(section, dict):
            raise InputError(f'{path}: key \'{name}\' is {section!r}; give {{"enabled": "auto"}}')
        _settle(section, "enabled", precision == name, path, "mixed_precision", prefix=f"{name}.")
    _check_the_rest(settings, path)
    return settings


def leave_clipping_to_chorus(settings: dict[str, Any]) -> dict[str, Any]:
    """A complete configuration, changed so that DeepSpeed does not check gradients: `stepping` clips and
    skips.

    DeepSpeed would compute each norm a second time, and the host would wait for the device twice in a step.
    fp16, stage 3 and an optimizer on the CPU have no such setting, and are left unchanged.

    Raises:
        InputError: the JSON requires a feature that is switched off here.
    """
    zero = settings["zero_optimization"]
    is_offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    if zero["stage"] == 3 or settings["fp16"]["enabled"] or is_offloaded:
        return settings
    changed = copy.deepcopy(settings)
    _decide(changed["zero_optimization"], "compute_grad_norm", JSON, TAKES_NORM, "zero_optimization.")
    if changed["bf16"]["enabled"]:
        _decide(changed["bf16"], "check_grad_overflow", JSON, TAKES_NORM, "bf16.")
    return {**changed, "gradient_clipping": 0.0}


@contextmanager
def refusals_of_deepspeed() -> Iterator[None]:
    """Raise InputError for settings of the JSON that DeepSpeed refuses only while it builds its engine."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        if isinstance(error, InputError) or not str(error) or not _is_raised_by_deepspeed(error):
            raise
        said = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"key 'deepspeed_config_file': DeepSpeed refuses its JSON: {said}; remove what it refuses"
        ) from error


def _is_raised_by_deepspeed(error: BaseException) -> bool:
    """Whether DeepSpeed, its models or Accelerate raised it: what torch raises has other causes."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("deepspeed", "pydantic", "accelerate")


def _check_the_rest(settings: dict[str, Any], path: str) -> None:
    """Check what DeepSpeed reads outside of `zero_optimization`, first by type and then with its own parser,
    before a model is loaded.
    """
    _check_types(settings, KNOWN_KEYS, path)
    for section in UNCHECKED.keys() & settings.keys():
        _check_types(settings[section], UNCHECKED[section], path, f"{section}.")
    from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum  # takes seconds: only when needed

    dtype = settings.get("data_types", {}).get("grad_accum_dtype") or "fp32"
    try:
        DtypeEnum(dtype)
    except ValueError as error:
        raise InputError(
            f"{path}: key 'data_types.grad_accum_dtype' is {dtype!r}; give fp32, bf16 or fp16, or remove it"
        ) from error
    for key in settings.keys() - {"zero_optimization"}:
        if KNOWN_KEYS[key] not in (dict, str):
            continue
        try:
            DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, key: copy.deepcopy(settings[key])})
        except ValidationError as error:
            section = "timers.throughput" if key == "timers" else key
            raise InputError(_in_one_line(error, path, section)) from error
        except (AssertionError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: key '{key}' is {settings[key]!r}: {error}; correct or remove it"
            ) from error


def _check_types(section: Mapping[str, Any], known: Mapping[str, type], path: str, prefix: str = "") -> None:
    """Refuse a name that is not known, and a value of another type."""
    for key, value in section.items():
        if key not in known:
            raise InputError(_unknown(path, key, known, prefix))
        wanted = known[key]
        if value is None and wanted is str:
            continue  # as DeepSpeed's documentation writes the defaults
        if type(value) not in ((int, float) if wanted is float else (wanted,)):  # true is not 1
            raise InputError(
                f"{path}: key '{prefix}{key}' is {value!r}; give {IN_WORDS[wanted]}, or remove it"
            )


def _in_one_line(error: ValidationError, path: str, section: str, names: Iterable[str] = ()) -> str:
    """The first mistake that DeepSpeed's own model of a section has found. names: the section's keys."""
    first = error.errors()[0]
    *sections, key = section, *map(str, first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(path, key, names if len(sections) == 1 else (), prefix=".".join([*sections, ""]))
    said = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").rstrip(".")
    value = f"is {first['input']!r}" if sections else "is refused"  # the value would be the whole section
    return f"{path}: key '{'.'.join([*sections, key])}' {value}: {said}; correct or remove it"


def _unknown(path: str, key: str, names: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, names, 1)
    remedy = f"did you mean '{prefix}{near[0]}'?" if near else "remove it"
    return f"{path}: key '{prefix}{key}' is not known; {remedy}"


def _check_zero(zero: dict[str, Any], path: str, environment: Mapping[str, str]) -> None:
    """Validate the section with DeepSpeed's own model before a model is loaded, and compare the launcher with
    it.
    """
    from deepspeed.runtime.zero.config import (
        DeepSpeedZeroConfig,
    )  # takes two seconds: imported only when needed

    for name, new in OLD_NAMES.items():
        if zero.get(name):
            raise InputError(
                f"{path}: key 'zero_optimization.{name}' is an old name; give \"{new}\": "
                '{"device": "cpu"} in its place'
            )
    offload = zero.get("offload_optimizer")
    for name in ("ratio", "super_offload"):
        if isinstance(offload, dict) and offload.get(name, "auto") not in ("auto", name == "ratio"):
            raise InputError(
                f"{path}: key 'zero_optimization.offload_optimizer.{name}' is {offload[name]!r}, but Chorus "
                f"{KEEPS_ADAMW}; remove it"
            )
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        names = [about.alias or name for name, about in DeepSpeedZeroConfig.model_fields.items()]
        raise InputError(_in_one_line(error, path, "zero_optimization", names)) from error
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in ("none", "cpu") or (
            name == "offload_param" and device == "cpu" and zero["stage"] < 3
        ):
            remedy = "give cpu or none" if device != "cpu" else "it needs stage 3"
            raise InputError(f"{path}: key 'zero_optimization.{name}.device' is {device!r}; {remedy}")
    launchers = {
        "stage": environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"),
        "offload_optimizer.device": environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
        "offload_param.device": environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
    }
    for name, theirs in launchers.items():
        key, _, inner = name.partition(".")
        ours = str((zero.get(key) or {}).get(inner, "none") if inner else zero[key])
        if theirs not in (None, ours):
            raise InputError(
                f"{path}: key 'zero_optimization.{name}' is {ours}, but the launcher says {theirs}; drop it "
                "from the launcher's options and its config file, and write what you want into the JSON that "
                "key 'deepspeed_config_file' names, such as recipes/deepspeed/zero3.json"
            )


def _json_path(ours: str | None, environment: Mapping[str, str]) -> str | None:
    """The one JSON of the run: the launcher's and the configuration's
    must be the same file. None: the built-in one."""
    launchers = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if launchers and ours and Path(launchers).resolve() != Path(ours).resolve():
        raise InputError(
            f"key 'deepspeed_config_file' is {ours}, but the launcher uses {launchers}; name the same file "
            "in both, or set the key to null to follow the launcher"
        )
    return launchers or ours


def _read(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicates)
    except OSError as error:
        raise InputError(
            f"key 'deepspeed_config_file': {path} cannot be read: {error.strerror}; check the path, or set "
            "it to null"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}; correct it") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: holds a {type(settings).__name__}; give a JSON object")
    return settings


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key '{key}' appears twice")
        found[key] = value
    return found


def _settle(
    section: dict[str, Any], key: str, ours: Any, path: str, our_name: str = "", prefix: str = ""
) -> None:
    """Fill in the value of configs.yaml where the JSON has none or "auto"; refuse a different one."""
    theirs = section.get(key, "auto")
    is_number = isinstance(theirs, (int, float)) and isinstance(theirs, bool) == isinstance(ours, bool)
    if theirs != "auto" and not (is_number and theirs == ours):
        raise InputError(
            f"{path}: key '{prefix}{key}' is {theirs!r}, but configs.yaml makes it {ours!r}"
            + (f" ({our_name})" if our_name else "")
            + '; write "auto" there, or change configs.yaml'
        )
    section[key] = ours


def _decide(section: dict[str, Any], key: str, path: str, why: str, prefix: str = "") -> None:
    """Switch a feature off that no key of configs.yaml names; refuse a JSON that asks for it."""
    if section.get(key, "auto") not in ("auto", False):
        raise InputError(f"{path}: key '{prefix}{key}' is {section[key]!r}, but Chorus {why}; remove it")
    section[key] = False
