"""Export of agents for other tools: as PEFT folders, as one adapter, or merged into the base."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from chorus.checkpoint.atomic_files import json_text, share
from chorus.checkpoint.ensemble_file import ENSEMBLE_FILE
from chorus.checkpoint.manifest import ADAPTER_FILE
from chorus.ensemble.adapter_files import AdapterFile, read_adapter
from chorus.ensemble.evaluate import Evaluation
from chorus.ensemble.load import Source, base_of, find_source, names_of, refuse_equal_agents
from chorus.errors import InputError
from chorus.exporting.card import Described, agents_card, mean_adapter_card, merged_model_card
from chorus.exporting.folders import new_folder, refuse_used, write_adapter, write_agent
from chorus.exporting.merge import add_to_base, mean_adapter
from chorus.model.base import base_reference, load_skeleton, load_tokenizer
from chorus.model.base_checks import model_errors_named
from chorus.model.quantisation import saved_quantisation

logger = logging.getLogger(__name__)

Merge = Literal["none", "cat", "into-base"]


def export(paths: Sequence[Path], out: Path, merge: Merge = "none", base: str | None = None) -> None:
    """Write agents into the new folder `out`, atomically.

    Args:
        paths: a finished output folder, a checkpoint, or PEFT LoRA folders of any ranks, scalings and layers.
        merge: none: `agent_0/`, ... and `ensemble.json`, which make an ensemble again. cat: one adapter,
            which adds the weighted mean of what the agents add. into-base: a plain model with that mean
            added to its weights.
        base: a folder or hub id to name in place of the one that the agents name.

    Raises:
        InputError: `out` is in use, what `load_ensemble` refuses of adapters, or a base that cannot be merged
            into.
        RunError: the write failed.
    """
    refuse_used(out)
    source = find_source(paths)
    base_name = base_reference(base or base_of(source, "--base BASE"))
    skeleton, tokenizer = load_skeleton(base_name), load_tokenizer(base_name)
    adapters = [read_adapter(folder, skeleton) for folder in source.folders]
    refuse_equal_agents(adapters, names_of(source.folders))
    if merge == "into-base":
        _refuse_quantised(base_name)
    about = _described(source, adapters, base_name, out.absolute().name)
    if merge == "none":
        size = sum((folder / ADAPTER_FILE).stat().st_size for folder in source.folders)
        with _finished(out, size, tokenizer, agents_card(about)) as new:
            for k, adapter in enumerate(adapters):
                write_agent(new / f"agent_{k}", adapter, base_name, skeleton)
            (new / ENSEMBLE_FILE).write_text(json_text(_entries(source, base_name)), encoding="utf-8")
        return
    mean = mean_adapter(adapters, source.mixture.weights)
    if merge == "cat":
        size = sum(matrix.nbytes for pair in mean.matrices.values() for matrix in pair)
        with _finished(out, size, tokenizer, mean_adapter_card(about, mean.rank)) as new:
            write_adapter(new, mean, base_name, skeleton)
        return
    model = _load_as_it_is(base_name)
    add_to_base(model, mean.matrices)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with _finished(out, size, tokenizer, merged_model_card(about, model.dtype)) as new:
        model.save_pretrained(new)
        for file in new.glob("*.safetensors"):
            share(file)


@contextmanager
def _finished(out: Path, size: int, tokenizer: PreTrainedTokenizerBase, card: str) -> Iterator[Path]:
    """The new folder, with the files besides the weights that every kind of export has."""
    with new_folder(out, size) as new:
        yield new
        tokenizer.save_pretrained(new)
        (new / "README.md").write_text(card, encoding="utf-8")


def _entries(source: Source, base_name: str) -> dict[str, Any]:
    """`ensemble.json` of the export, as in a run: agents, mixture, base, and the run's own entries."""
    of_run = dict(source.description)
    if "agents" not in of_run:  # a checkpoint's state, or none
        of_run = {key: of_run[key] for key in ("config",) if key in of_run}
    agents = [f"agent_{k}" for k in range(len(source.folders))]
    return {**of_run, "agents": agents, "base_model": base_name, **source.mixture.to_json()}


def _described(source: Source, adapters: Sequence[AdapterFile], base_name: str, title: str) -> Described:
    ranks = [max(len(A_RI) for A_RI, _ in adapter.matrices.values()) for adapter in adapters]
    config = source.description.get("config") or {}
    how = {"load_in_4bit": "4 bits", "load_in_8bit": "8 bits"}
    quantised = next((bits for key, bits in how.items() if config.get(key)), "")
    scores = (source.description.get("evaluation") or {}).get("after") or {}
    try:
        evaluation = Evaluation.from_report(scores)
    except (KeyError, TypeError, AttributeError):
        logger.warning("the scores in ensemble.json cannot be read; the card leaves them out")
        evaluation = Evaluation()
    mixture, names = source.mixture, names_of(source.folders)
    return Described(
        *(title, base_name, names, ranks, mixture.weights, mixture.temperature, evaluation, quantised)
    )


def _refuse_quantised(base_name: str) -> None:
    with model_errors_named(base_name):
        config = AutoConfig.from_pretrained(base_name, trust_remote_code=False)
    if saved_quantisation(config) is not None:
        raise InputError(
            f"{base_name}: its weights are quantised, and nothing can be added to them; name the base that "
            "it was made from with --base, or export with --merge cat"
        )


def _load_as_it_is(base_name: str) -> PreTrainedModel:
    """The base in the dtype of its file and with its own configuration, both of which are saved."""
    with model_errors_named(base_name):
        return AutoModelForCausalLM.from_pretrained(
            base_name, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
