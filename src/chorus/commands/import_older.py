"""Import adapters of the older layout: `agent0_weights.pth`, ... and `ci_llm_meta_config.json`.

    python -m chorus.checkpoint import OLD NEW [model_name=BASE]

OLD holds each agent's adapter as `torch.save` wrote it, under PEFT's names, and one JSON file of settings.
NEW becomes a folder like that of a run: `agents/agent_k/` for any PEFT tool, `ensemble.json` and
`config.yaml`. No code from a file is run, and every tensor must have a name and shape that PEFT makes for
this base, rank and targets.
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from pydantic import ValidationError
from torch import Tensor

from chorus.checkpoint.export import save_ensemble
from chorus.config import RunConfig
from chorus.errors import InputError, first_line
from chorus.model.adapters import TensorId, lora_shape
from chorus.model.base import load_skeleton

META = "ci_llm_meta_config.json"
KEYS = {  # a key's name in the older layout, and ours
    **{"r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
    **{"target_modules": "lora_target_modules", "K_agents": "num_agents"},
    **{"parallel_mode": "parallel_mode", "model_name": "model_name"},
}
FIXED = {"bias": "none", "task_type": "CAUSAL_LM"}  # further keys, and the only value allowed for each
NOT_CARRIED_OVER = ["optimizer moments", "step and position in the data", "how the run was trained"]
TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<matrix>[AB])(?:\.(?P<adapter>\w+))?\.weight"
)


def import_older(old: Path, new: Path, model_name: str | None = None) -> list[str]:
    """Write the adapters of folder `old` to `new`, which must be absent or empty.

    Args:
        model_name: the base; only its configuration is read. None: `ci_llm_meta_config.json` names it.

    Returns:
        Warnings for the user, such as an agent that was never trained.

    Raises:
        InputError: a file is missing, damaged, does not fit the base, or would run code.
        RunError: the disk is full. `new` is unchanged in either case.
    """
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise InputError(f"{new}: exists and is not empty; name a new folder")
    config = _read_meta(old, model_name)
    shapes = _expected(config)
    unknown = {file.name for file in old.glob("agent*_weights.pth")} - {
        f"agent{agent}_weights.pth" for agent in range(config.num_agents)
    }
    if unknown:
        raise InputError(
            f"{old / min(unknown)}: {META} says {config.num_agents} agents (K_agents); correct one of them"
        )
    tensors: dict[TensorId, Tensor] = {}
    for agent in range(config.num_agents):
        tensors |= _read_agent(old / f"agent{agent}_weights.pth", agent, shapes)
    more = {"imported": {"from": str(old), "not_carried_over": NOT_CARRIED_OVER}}
    half_done = new.with_name(new.name + ".half-done")
    try:
        shutil.rmtree(half_done, ignore_errors=True)
        half_done.mkdir(parents=True)
        save_ensemble(half_done, tensors, [1 / config.num_agents] * config.num_agents, config, more)
        half_done.replace(new)
    except OSError as error:
        raise InputError(f"{new}: cannot be made ({error.strerror}); name another folder") from error
    return [
        f"agent {agent}: every B is zero, so it answers as the base does: it was never trained"
        for agent in range(config.num_agents)
        if not any(bool(t.any()) for identity, t in tensors.items() if identity[::2] == (agent, "B"))
    ]


def _read_meta(old: Path, model_name: str | None) -> RunConfig:
    file = old / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); name the folder that holds it"
        ) from error
    except ValueError as error:
        raise InputError(f"{file}: is not valid JSON: {error}; correct it") from error
    if not isinstance(meta, dict):
        raise InputError(f"{file}: holds {json.dumps(meta)[:80]}; give a JSON object")
    for key, value in meta.items():
        if key not in KEYS.keys() | FIXED.keys():
            raise InputError(
                f"{file}: key {key!r} is not known; remove or correct it: the layout has "
                f"{', '.join((*KEYS, *FIXED))}"
            )
        if key in FIXED and value != FIXED[key]:
            raise InputError(
                f"{file}: key {key!r} is {value!r}; only {FIXED[key]!r} can be imported, so train it anew"
            )
    for key in ("r", "lora_alpha", "target_modules", "K_agents"):
        if key not in meta:
            raise InputError(f"{file}: key {key!r} is missing; add it, as it was in training")
    ours = {KEYS[key]: value for key, value in meta.items() if key in KEYS}
    if model_name is not None:
        ours["model_name"] = model_name
    if "model_name" not in ours:
        raise InputError(f"{file}: does not name the base; add model_name=BASE to the command")
    try:
        return RunConfig(**{"lambda_sw": 0.0, **ours})
    except ValidationError as error:
        first = error.errors()[0]
        key = next(key for key, our in KEYS.items() if our == first["loc"][0])
        said = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{file}: key {key!r} is {meta.get(key)!r}; {said}; correct it") from error


def _expected(config: RunConfig) -> dict[tuple[str, str], tuple[int, ...]]:
    """The shape of every tensor that PEFT makes for one agent, by (path, matrix)."""
    skeleton = load_skeleton(config.model_name)
    shape = lora_shape(config)
    peft_model = get_peft_model(skeleton, shape.peft_config(config.model_name, shape.targets(skeleton).paths))
    found = ((TENSOR.fullmatch(name), parameter) for name, parameter in peft_model.named_parameters())
    return {(_path(match), match["matrix"]): tuple(parameter.shape) for match, parameter in found if match}


def _path(match: re.Match[str]) -> str:
    return f"base_model.model.{match['path']}"


def _read_agent(
    file: Path, agent: int, shapes: Mapping[tuple[str, str], tuple[int, ...]]
) -> dict[TensorId, Tensor]:
    """One agent's tensors in fp32, after every check."""
    tensors: dict[TensorId, Tensor] = {}
    for name, tensor in _unpickle(file).items():
        match = TENSOR.fullmatch(name) if isinstance(name, str) else None
        if match is None or match["adapter"] not in (None, "default", f"agent{agent}", f"agent_{agent}"):
            raise InputError(f"{file}: {str(name)[:200]!r} is not a LoRA tensor of agent {agent}; remove it")
        identity = TensorId(agent, _path(match), "A" if match["matrix"] == "A" else "B")
        wanted = shapes.get(identity[1:])
        if wanted is None:
            raise InputError(
                f"{file}: {name}: the base has no such target; correct model_name or target_modules"
            )
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{file}: {name}: is {what}, no floating-point tensor; save it as one")
        if tuple(tensor.shape) != wanted:
            raise InputError(
                f"{file}: {name}: has shape {tuple(tensor.shape)}; this base and rank need {wanted}; "
                f"correct model_name, or r in {META}"
            )
        if identity in tensors:
            raise InputError(f"{file}: {name}: is in the file twice, under two names; remove one")
        tensors[identity] = tensor.detach().float().contiguous()
        if not bool(torch.isfinite(tensors[identity]).all()):
            raise InputError(f"{file}: {name}: holds a NaN or an infinity; take an earlier save")
    for path, matrix in shapes:
        if TensorId(agent, path, "A" if matrix == "A" else "B") not in tensors:
            raise InputError(
                f"{file}: {path}.lora_{matrix}.weight is missing; correct target_modules in {META}"
            )
    return tensors


def _unpickle(file: Path) -> dict[Any, Any]:
    """The state dict in a file of `torch.save`. A file with anything but tensors and plain containers is
    refused, and none of its code is run.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); {META} asks for it (K_agents)"
        ) from error
    except Exception as error:  # a damaged file raises errors of many types
        reason = first_line(error)[:120]
        raise InputError(
            f"{file}: does not hold plain tensors and was not loaded ({reason}); save a state dict of "
            "tensors alone with torch.save, or take another copy"
        ) from error
    if not isinstance(state, dict):
        raise InputError(f"{file}: holds a {type(state).__name__}; save the adapter's state dict in it")
    return state


USAGE = "python -m chorus.checkpoint import OLD NEW [model_name=BASE]"


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    if arguments in (["-h"], ["--help"]):
        print(f"{USAGE}\n\n{(__doc__ or '').strip()}")
        return
    base = [
        argument.removeprefix("model_name=") for argument in arguments if argument.startswith("model_name=")
    ]
    places = [argument for argument in arguments if not argument.startswith("model_name=")]
    if len(places) != 3 or places[0] != "import" or len(base) > 1:
        raise InputError(f"command line: {' '.join(arguments) or 'nothing'} is not understood; {USAGE}")
    old, new = map(Path, places[1:])
    remarks = import_older(old, new, *base)
    for remark in remarks:
        print(f"remark: {remark}", file=sys.stderr)
    print(f"the agents are in {new / 'agents'}; not carried over: {', '.join(NOT_CARRIED_OVER)}")
