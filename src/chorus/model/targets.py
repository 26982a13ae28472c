"""The layers of a base that carry adapters: `lora_target_modules` and related keys, resolved to module paths.

Adapters belong on layers that text passes through. Adapters on a tower for images or audio, or on an unused
projection of a layer that shares another layer's keys and values, would never get a gradient. One short
forward pass shows which linear layers take part.
"""

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chorus.errors import InputError

logger = logging.getLogger(__name__)

Names = Sequence[str] | str  # names, paths or ends of paths; or one regular expression over whole paths
LINEAR = (nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear layer that stores its weight transposed
AUTO, ALL_LINEAR = "auto", "all-linear"
# Modules of a decoder layer that `auto` recognises as attention or MLP. OPT has fc1 and fc2 in the layer
# itself.
BLOCK = re.compile(r"attn|attention|mlp|ffn|feed_?forward|mixer|^fc\d$|_experts?$")
# Routers select experts: an adapter on one would change which experts see a token.
ROUTER = re.compile(r"^(router|gate|shared_expert_gate)$")
FEW = 8  # names shown in a message


class Targets(NamedTuple):
    """The layers that carry adapters, and those that were requested but left out.

    Attributes:
        paths: modules of the model, in its order.
        unreached: matching linear layers that no text passes through.
        experts: modules that hold experts as parameters, which get no adapter.
        for_experts: matching linear layers whose name PEFT interprets as the experts.
    """

    paths: list[str]
    unreached: list[str]
    experts: list[str]
    for_experts: list[str]

    def log(self) -> None:
        """Log how many layers carry adapters, and what was left out."""
        left_out = [
            f"{len(paths)} {what} ({_some(paths)})"
            for paths, what in (
                (self.unreached, "linear layers that no text passes through"),
                (self.experts, "groups of experts, which are parameters and no layers"),
                (self.for_experts, "layers whose names mean the experts to PEFT"),
            )
            if paths
        ]
        more = f"; left out: {', '.join(left_out)}" if left_out else ""
        logger.info("adapters on %d linear layers%s", len(self.paths), more)


def find_targets(
    model: PreTrainedModel, wanted: Names, excluded: Names = (), layers: Collection[int] | None = None
) -> Targets:
    """Resolve `lora_target_modules`, `lora_exclude_modules` and `layers_to_transform` in this model.

    A model on the meta device cannot run a pass: unreached layers are then found by the module tree alone,
    which may miss a few.

    Raises:
        InputError: nothing matches, a match is no linear layer, or a decoder layer does not exist.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    text = _text_modules(model)
    chosen = _chosen(model, modules, text, wanted)
    if excluded:
        _refuse_unmatched("lora_exclude_modules", excluded, modules)
        chosen = [path for path in chosen if not _matches(path, excluded)]
    if layers is not None:
        chosen = _in_layers(chosen, layers, model.config.get_text_config().num_hidden_layers)
    reached = text.keys() if _is_meta(model) else _reached(model, chosen) & text.keys()
    unreached = [path for path in chosen if path not in reached]
    paths = [path for path in chosen if path in reached]
    for_experts = _meant_for_experts(model, paths)
    if for_experts and wanted not in (AUTO, ALL_LINEAR):
        raise InputError(
            f"key 'lora_target_modules': {_some(sorted({_leaf(path) for path in for_experts}))}: in "
            f"{type(model).__name__} PEFT takes these names to mean the experts, which are parameters and "
            "get no adapter here; leave them out, or set it to auto"
        )
    paths = [path for path in paths if path not in for_experts]
    if not paths:
        why = f"no text passes through {_some(unreached)}" if unreached else "nothing is left to adapt"
        raise InputError(
            f"key 'lora_target_modules' is {_as_text(wanted)}: {why}; "
            f"the text model's linear layers are {_linear_names(modules, text)}"
        )
    experts = [path for path in text if path in modules and _holds_experts(path, modules[path])]
    return Targets(paths, unreached, experts, for_experts)


def peft_target_modules(
    paths: Collection[str], modules: Collection[str], wanted: Names = AUTO
) -> list[str] | str:
    """`target_modules` of a PEFT configuration that means exactly these of a model's `modules`.

    Plain names where they suffice, because every tool reads them; otherwise one regular expression over whole
    paths.

    Args:
        modules: empty where they are not known.
        wanted: as configured; a list of names is kept if it means the same.
    """
    names = sorted({_leaf(path) for path in paths}) if isinstance(wanted, str) else sorted(wanted)
    is_known = bool(modules) or not isinstance(wanted, str)
    if is_known and {path for path in modules or paths if _matches(path, names)} == set(paths):
        return names
    numbers_of: dict[
        str, dict[str, None]
    ] = {}  # path with its first number replaced -> the numbers, in order
    whole = []
    for path in paths:
        match = re.match(r"(.*?\.)(\d+)(\..*)", path)
        if match is None:
            whole.append(re.escape(path))
        else:
            numbers_of.setdefault(f"{match[1]} {match[3]}", {})[match[2]] = None
    ends_of: dict[tuple[str, str], list[str]] = {}
    for parts, numbers in numbers_of.items():
        before, after = parts.split(" ")
        ends_of.setdefault((before, "|".join(numbers)), []).append(re.escape(after))
    for (before, numbers), ends in ends_of.items():
        whole.append(rf"{re.escape(before)}(?:{numbers})(?:{'|'.join(ends)})")
    return "|".join(whole)


def _chosen(
    model: PreTrainedModel, modules: dict[str, nn.Module], text: dict[str, None], wanted: Names
) -> list[str]:
    """Paths that `wanted` matches, outside of the text model too: those are counted as left out."""
    head = model.get_output_embeddings()
    linear = [path for path, module in modules.items() if isinstance(module, LINEAR) and module is not head]
    if wanted in (AUTO, ALL_LINEAR):
        inside = [path for path in linear if path in text and "experts" not in path.split(".")]
        outside = [path for path in linear if path not in text]  # a tower's
        if wanted == ALL_LINEAR:
            return inside + outside
        blocks = [path for path in inside if _is_in_block(path)]
        return (blocks or [path for path in inside if re.search(r"\.\d+\.", path)]) + outside
    for name in [wanted] if isinstance(wanted, str) else wanted:
        hits = [
            path for path in modules if path and _matches(path, name if isinstance(wanted, str) else [name])
        ]
        others = [path for path in hits if path not in linear]
        if any(
            path in linear and path in text for path in hits
        ):  # modules of this name in a tower are left out
            others = [path for path in others if path in text]
        if not hits or others:
            found = (
                f"{others[0]} is a {type(modules[others[0]]).__name__}"
                if hits
                else "the model has no such layer"
            )
            raise InputError(
                f"key 'lora_target_modules': {name!r} cannot carry an adapter: {found}; "
                f"the text model's linear layers are {_linear_names(modules, text)}"
            )
    return [path for path in linear if _matches(path, wanted)]


def _is_in_block(path: str) -> bool:
    _, _, below = re.sub(r"^(.*?\.)?\d+\.", "\0", path, count=1).rpartition("\0")
    parts = below.split(".")
    return below != path and not any(map(ROUTER.search, parts)) and any(map(BLOCK.search, parts))


def _text_modules(model: PreTrainedModel) -> dict[str, None]:
    """Paths of the text decoder's modules, in the model's order; all modules of a model without towers."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = {id(module) for module in (decoder or model).modules()}
    return {path: None for path, module in model.named_modules() if id(module) in inside}


def _is_meta(model: PreTrainedModel) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def _reached(model: PreTrainedModel, paths: Sequence[str]) -> set[str]:
    """Which of these layers are called when text passes through in training mode.

    A layer whose weight is read directly (AltUp's coefficients in Gemma 3n) is not called: its adapter would
    have no effect.
    """
    reached: set[str] = set()
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: reached.add(path))
        for path in paths
    ]
    was_training = model.training
    try:
        model.train()
        with torch.random.fork_rng():  # a base loaded elsewhere may have dropout
            model.base_model(
                input_ids=torch.ones(1, 2, dtype=torch.int64, device=model.device), use_cache=False
            )
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return reached | {
        path for path in paths if "experts" in path.split(".")
    }  # a router may send these few tokens to other experts


def _meant_for_experts(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """Layers whose name PEFT maps to the experts' parameters: no PEFT folder can hold their adapters."""
    taken = set()
    for name in {_leaf(path) for path in paths}:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # PEFT would also have to map another name
            taken.add(name)
        if name not in (config.target_modules or ()):
            taken.add(name)
    return [path for path in paths if _leaf(path) in taken]


def _in_layers(paths: list[str], layers: Collection[int], num_layers: int) -> list[str]:
    wrong = sorted(layer for layer in layers if layer >= num_layers)
    if wrong:
        raise InputError(
            f"key 'layers_to_transform': the base has no decoder layer {wrong[0]}; they are 0 to "
            f"{num_layers - 1}"
        )
    numbers = {path: re.search(r"\.(\d+)\.", path) for path in paths}
    return [path for path, number in numbers.items() if number is not None and int(number[1]) in layers]


def _holds_experts(path: str, module: nn.Module) -> bool:
    return _leaf(path) == "experts" and any(True for _ in module.parameters(recurse=False))


def _matches(path: str, names: Names) -> bool:
    """As PEFT matches `target_modules`."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _refuse_unmatched(key: str, names: Names, modules: Iterable[str]) -> None:
    for name in [names] if isinstance(names, str) else names:
        if not any(_matches(path, name if isinstance(names, str) else [name]) for path in modules):
            raise InputError(
                f"key {key!r}: {name!r} matches nothing in the model; correct it or leave it out"
            )


def _linear_names(modules: dict[str, nn.Module], text: Collection[str]) -> str:
    return (
        ", ".join(sorted({_leaf(path) for path in text if isinstance(modules.get(path), LINEAR)})) or "none"
    )


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:FEW]) + (", ..." if len(paths) > FEW else "")


def _as_text(names: Names) -> str:
    return names if isinstance(names, str) else f"[{', '.join(names)}]"
