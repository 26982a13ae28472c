"""Where a run begins: anew, or at a checkpoint that is whole and belongs to the same run.

Everything is verified before anything is changed. What the run is (its objective, rows, base, schedule) must be equal;
how it is carried out (mode, engine, processes, logging) may change.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chorus.checkpoint.store import MANIFEST, Damaged, checkpoints, read_tensors, set_aside_later, verify
from chorus.collectives import on_every_process, on_first_process, refuse_differences, sampled
from chorus.config import Config, on_resume
from chorus.config.section import OnResume
from chorus.errors import InputError
from chorus.training.engine import Engine, zero_stage
from chorus.training.state import restore_state

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "deepspeed")  # whose versions every host must have
START_OVER = "or start over with resume_from_checkpoint=null or another output_dir"


class Start(NamedTuple):
    """Where a run begins.

    folder: the checkpoint, verified; None is a fresh start.
    facts: its `state.json`.
    in_place: it lies in `output_dir`, in which the run goes on.
    is_finished: nothing is left to do.
    notes: warnings for the log: checkpoints that were passed over.
    """

    folder: Path | None = None
    facts: Mapping[str, Any] = {}
    in_place: bool = False
    is_finished: bool = False
    notes: Sequence[str] = ()

    @property
    def step(self) -> int:
        """Optimiser steps that are already done."""
        return self.facts.get("step", 0)

    @property
    def skips_in_a_row(self) -> int:
        """How many of the last steps, without a gap, skipped an agent's update."""
        return self.facts.get("skips_in_a_row", 0)

    def log(self) -> None:
        """Say where the run begins, and which checkpoints were passed over."""
        for note in self.notes:
            logger.warning(note)
        if self.folder is not None:
            logger.info("going on from %s, after %d of %d steps", self.folder, self.step, self.facts["num_steps"])

    def finished_message(self, output_dir: str) -> str:
        """What to tell who starts a run that is done."""
        return (
            f"{output_dir} holds this run, finished after {self.step} steps: nothing is left to do.\n"
            f"  its agents:     {output_dir}/agents, scores in {output_dir}/ensemble.json\n"
            f"  to start over:  resume_from_checkpoint=null (the finished run then steps aside, nothing is lost)\n"
            f"  to train on:    output_dir=runs/another init_adapters_from={output_dir}\n"
            f"  another run:    output_dir=runs/another"
        )


def describe_run(
    config: Config,
    data_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The entries of `state.json` that hold for the whole run, but for `num_steps` and the base's fingerprint.

    Raises:
        InputError: on every process alike: they are others on another host.
    """
    stage = zero_stage(accelerator)
    engine = f"zero{stage}" if stage else "plain" if accelerator.num_processes == 1 else "ddp"
    fingerprints = {"tokenizer": tokenizer_fingerprint(tokenizer), "data": data_fingerprint}
    keys = {f"key '{key}'": value for key, value in config.model_dump().items()}
    refuse_differences(
        {
            **keys,
            "the precision": precision,
            **{f"the {name} fingerprint": value for name, value in fingerprints.items()},
            **{f"the version of {name}": version(name) for name in LIBRARIES},
        }
    )
    return {
        "parallel_mode": config.parallel_mode,
        "engine": engine,
        "world_size": accelerator.num_processes,
        "precision": precision,
        "fingerprints": fingerprints,
        "config": config.model_dump(),
    }


def find_start(config: Config, run: Mapping[str, Any], accelerator: Accelerator) -> Start:
    """Where `resume_from_checkpoint` says that this run begins. A collective call; it changes nothing.

    Raises:
        InputError: the named checkpoint is none or damaged, or the checkpoint is that of another run.
    """
    begin = on_first_process(accelerator, lambda: _find(config, run))
    if begin.folder is not None:
        on_every_process(partial(_refuse_unseen, begin.folder))
    return begin


def _refuse_unseen(folder: Path) -> None:
    """Every process reads the tensors for itself."""
    if not (folder / MANIFEST).is_file():
        raise InputError(f"key 'resume_from_checkpoint': {folder} is not seen; name a folder that all hosts share")


def _find(config: Config, run: Mapping[str, Any]) -> Start:
    output_dir, notes = Path(config.output_dir), []
    if config.resume_from_checkpoint is None:
        return Start()
    if config.resume_from_checkpoint != "auto":
        folder = Path(config.resume_from_checkpoint)
        if not any(os.path.isfile(folder / name) for name in (MANIFEST, "state.json")):
            example = next(iter(checkpoints(folder)), Path(output_dir, "checkpoints", "step_000100"))
            raise InputError(
                f"key 'resume_from_checkpoint': {folder} is no checkpoint; name a folder such as {example}, or "
                "auto, or null for a fresh start"
            )
        try:
            facts = verify(folder)
        except Damaged as error:
            raise InputError(f"{error}; name another checkpoint, or resume_from_checkpoint=auto") from error
    else:
        for folder in checkpoints(output_dir):
            try:
                facts = verify(folder)
                break
            except Damaged as error:
                notes.append(f"{error}; the checkpoint is passed over")
        else:
            return Start(notes=notes)
    refuse_another_run(facts, config, run, folder)
    in_place = folder.resolve().is_relative_to(output_dir.resolve())
    is_trained = facts["step"] == facts["num_steps"] or has_stopped_early(facts, config)
    is_finished = in_place and is_trained and _is_evaluated(output_dir)
    return Start(folder, facts, in_place, is_finished, notes)


def has_stopped_early(facts: Mapping[str, Any], config: Config) -> bool:
    """Whether patience has ended the run of a checkpoint; without patience, it goes on from there."""
    return bool(facts.get("stopped_early")) and config.early_stopping_patience > 0


def _is_evaluated(output_dir: Path) -> bool:
    """The evaluation is the last act of a run, and writes itself into `ensemble.json`."""
    file = output_dir / "ensemble.json"
    return file.is_file() and "evaluation" in json.loads(file.read_text(encoding="utf-8"))


def refuse_another_run(facts: Mapping[str, Any], config: Config, run: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError where the checkpoint is not of this run: it names the key, both values and the remedy."""

    def refuse(what: str, ours: object, theirs: object) -> None:
        raise InputError(f"{what} is {ours}, but {theirs} in {folder}; set it back, {START_OVER}")

    old = {key: facts["config"].get(key, field.default) for key, field in Config.model_fields.items()}
    for key, ours in config.model_dump().items():
        if on_resume(key) is OnResume.MUST_EQUAL and ours != old[key]:
            refuse(f"key '{key}'", ours, old[key])
    if config.max_train_steps is None and config.epochs != old["epochs"]:
        refuse("key 'epochs'", config.epochs, old["epochs"])
    if run["precision"] != facts["precision"]:
        refuse("key 'mixed_precision'", run["precision"], facts["precision"])
    own_rows = config.batch_size * run["world_size"]
    old_rows = old["batch_size"] * facts["world_size"]
    if config.lambda_sw > 0 and own_rows != old_rows:  # the distance compares the rows of a micro-batch
        refuse("with lambda_sw above 0, key 'batch_size' x processes", own_rows, old_rows)
    own_rows *= config.gradient_accumulation_steps
    old_rows *= old["gradient_accumulation_steps"]
    if own_rows != old_rows:
        refuse("key 'batch_size' x gradient_accumulation_steps x processes", own_rows, old_rows)
    _refuse_other_fingerprint("tokenizer", "model_name", facts, run, folder)
    _refuse_other_fingerprint("data", "dataset_name", facts, run, folder)


def refuse_another_base(start: Start, run: Mapping[str, Any]) -> None:
    """Raises InputError where the base is another than that of the checkpoint, or than another host's."""
    refuse_differences({"key 'model_name': the base's fingerprint": run["fingerprints"]["base"]})
    if start.folder is not None:
        _refuse_other_fingerprint("base", "model_name", start.facts, run, start.folder)


def _refuse_other_fingerprint(
    name: str, key: str, facts: Mapping[str, Any], run: Mapping[str, Any], folder: Path
) -> None:
    if facts["fingerprints"][name] != run["fingerprints"][name]:
        ours, theirs = run["config"][key], facts["config"][key]
        what = {"tokenizer": "its tokenizer", "data": "its training rows", "base": "its weights or architecture"}[name]
        raise InputError(
            f"key '{key}': {ours}: {what} differ{'s' if name == 'tokenizer' else ''} from that of {folder}, trained "
            f"with {theirs}; restore it, {START_OVER}"
        )


def restore_run(engine: Engine, start: Start, output_dir: Path) -> None:
    """Put the engine where the checkpoint left off. A collective call.

    Raises:
        InputError: the checkpoint's tensors are not those of the agents.
    """
    if start.folder is None:
        return
    restore_state(engine, read_tensors(start.folder, start.facts["optimizer_step"]))
    engine.accelerator.wait_for_everyone()
    on_first_process(engine.accelerator, lambda: set_aside_later(output_dir, start.step))


def load_best(engine: Engine, output_dir: Path, best: Mapping[str, Any] | None) -> None:
    """Give the agents the weights of the best step's checkpoint, for scoring and export; training ends with it.

    Raises:
        InputError: that checkpoint is damaged.
    """
    if best is None:
        return
    folder = output_dir / "checkpoints" / f"step_{best['step']:06d}"
    restore_state(engine, read_tensors(folder, verify(folder)["optimizer_step"]))
    logger.info("the agents of step %d are the best: %s %.4g", best["step"], best["metric"], best["value"])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what the tokenizer does: its `tokenizer.json`, or its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(f"{tokenizer.eos_token_id}\n{text}".encode()).hexdigest()


def base_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over every parameter's name, shape and 16 evenly spaced values, and the configuration's numbers.

    Cheap, where hashing all weights would read some gigabytes: it tells another model from this one, and a base that
    was trained further, but not one changed in a few places.
    """
    # Where it lies, what wrote it and how attention is computed say nothing about the model.
    beside = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"}
    config = {key: value for key, value in model.config.to_dict().items() if key not in beside}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
    for values in sampled(list(model.parameters())):
        digest.update(values)
    return digest.hexdigest()
