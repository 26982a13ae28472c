"""Where a run begins: at step 0, or at an intact checkpoint of the same run.

Everything is verified before anything is changed. What defines the run (objective, rows, base, schedule) must
be equal; how it is executed (mode, engine, processes, logging) may change.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chorus.checkpoint.ensemble_file import ENSEMBLE_FILE, refuse_unfinished
from chorus.checkpoint.fingerprints import base_fingerprint, tokenizer_fingerprint
from chorus.checkpoint.manifest import MANIFEST, num_agents_of, read_manifest, unexpected_files
from chorus.checkpoint.state_file import STATE_FILE, BestStep, StateFile, read_state_file
from chorus.checkpoint.store import checkpoints, read_tensors, set_aside_later, verify
from chorus.checkpoint.untrusted_files import Damaged
from chorus.collectives import on_every_process, on_first_process, refuse_differences
from chorus.config import Config, as_settings, on_resume
from chorus.config.section import OnResume
from chorus.errors import InputError
from chorus.progress import announced
from chorus.training.engine import Engine, zero_stage
from chorus.training.state import TrainingState, restore_state

logger = logging.getLogger(__name__)

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
)  # whose versions every host must have


class Start(NamedTuple):
    """Where a run begins.

    folder: the checkpoint, verified; None is a fresh start.
    saved: its `state.json`.
    in_place: the checkpoint is in `output_dir`, where the run resumes.
    is_finished: nothing is left to do.
    notes: warnings for the log, such as checkpoints that were passed over.
    seen: names of the checkpoints in `output_dir` at the time of the search; None where they do not matter.
    """

    folder: Path | None = None
    saved: StateFile | None = None
    in_place: bool = False
    is_finished: bool = False
    notes: Sequence[str] = ()
    seen: Sequence[str] | None = None

    @property
    def step(self) -> int:
        """Optimiser steps that are already done."""
        return 0 if self.saved is None else self.saved.step

    @property
    def skips_in_a_row(self) -> int:
        """Number of consecutive steps, up to this one, in which some agent's update was skipped."""
        return 0 if self.saved is None else self.saved.skips_in_a_row

    def log(self) -> None:
        """Say where the run begins, and which checkpoints were passed over."""
        for note in self.notes:
            logger.warning(note)
        if self.saved is not None:
            logger.info(
                "resuming from %s, after %d of %d steps", self.folder, self.step, self.saved.num_steps
            )

    def finished_message(self, output_dir: str) -> str:
        """The message to a user who starts a finished run again."""
        return (
            f"{output_dir} holds this run, finished after {self.step} steps: nothing is left to do.\n  its "
            f"agents:     {output_dir}/agents, scores in {output_dir}/ensemble.json\n  to start over:  "
            "resume_from_checkpoint=null (the finished run is then moved aside, nothing is lost)\n  to train "
            f"on:    output_dir=runs/another init_adapters_from={output_dir}\n  another run:    "
            "output_dir=runs/another"
        )


def describe_run(
    config: Config,
    data_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The entries of `state.json` that are constant over a run, except `num_steps` and the base's
    fingerprint.

    Raises:
        InputError: on every process alike: the values differ between hosts.
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


def with_base(run: Mapping[str, Any], model: PreTrainedModel, num_steps: int) -> dict[str, Any]:
    """The entries of `describe_run` with those that are known only once the base is loaded."""
    fingerprints = {**run["fingerprints"], "base": base_fingerprint(model)}
    return {**run, "num_steps": num_steps, "fingerprints": fingerprints}


@announced("looking for a checkpoint")
def find_start(config: Config, run: Mapping[str, Any], accelerator: Accelerator) -> Start:
    """Where `resume_from_checkpoint` says that this run begins. A collective call; it changes nothing.

    Raises:
        InputError: what `resume_from_checkpoint` names is not a checkpoint or is damaged, or the checkpoint
            belongs to another run.
    """
    begin = on_first_process(accelerator, lambda: _find(config, run))
    if begin.folder is not None:
        on_every_process(partial(_refuse_unseen, begin.folder))
    return begin


def _refuse_unseen(folder: Path) -> None:
    """Every process reads the tensors for itself."""
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"key 'resume_from_checkpoint': {folder} is not seen; name a folder that all hosts share"
        )


def _find(config: Config, run: Mapping[str, Any]) -> Start:
    if config.resume_from_checkpoint is None:
        return Start()
    output_dir = Path(config.output_dir)
    seen = tuple(folder.name for folder in checkpoints(output_dir))
    if config.resume_from_checkpoint == "auto":
        folder, saved, notes = _newest_whole(output_dir)
    else:
        folder = Path(config.resume_from_checkpoint)
        saved, notes = _named(folder, output_dir), list[str]()
    if folder is None or saved is None:
        return Start(notes=notes, seen=seen)
    refuse_another_run(saved, config, run, folder)
    entries = read_manifest(folder)
    extra = unexpected_files(folder, num_agents_of(entries))
    if extra:
        notes.append(
            f"{folder / extra[0]}: is not part of the checkpoint and is not read ({len(extra)} such files)"
        )
    place = output_dir.resolve() / "checkpoints"
    in_place = folder.resolve().parent in (place, place / "set_aside")
    is_finished = False
    if in_place and (saved.step == saved.num_steps or has_stopped_early(saved, config)):
        try:
            best = saved.best if config.load_best_model_at_end else None
            exported = folder if best is None else folder.with_name(f"step_{best.step:06d}")
            refuse_unfinished(output_dir, read_manifest(exported))
            is_finished = True
        except Damaged as error:
            if (output_dir / ENSEMBLE_FILE).exists():
                notes.append(f"{error}; the agents are exported and evaluated again")
    return Start(folder, saved, in_place, is_finished, notes, seen)


def has_stopped_early(saved: StateFile | None, config: Config) -> bool:
    """Whether early stopping has ended the run of a checkpoint; without early stopping the run resumes from
    there.
    """
    return saved is not None and saved.stopped_early and config.early_stopping_patience > 0


def _newest_whole(output_dir: Path) -> tuple[Path | None, StateFile | None, list[str]]:
    """The newest intact checkpoint, and a warning for each newer, damaged one."""
    notes = []
    for folder in checkpoints(output_dir):
        try:
            return folder, _verified(folder), notes
        except Damaged as error:
            notes.append(f"{error}; this checkpoint is passed over")
    return None, None, notes


def _named(folder: Path, output_dir: Path) -> StateFile:
    """`state.json` of the checkpoint that the user names, verified."""
    if not any(os.path.lexists(folder / name) for name in (MANIFEST, STATE_FILE)):
        example = next(iter(checkpoints(output_dir)), Path(output_dir, "checkpoints", "step_000100"))
        raise InputError(
            f"key 'resume_from_checkpoint': {folder} is not a checkpoint; name a folder such as {example}, "
            "or auto, or null for a fresh start"
        )
    try:
        return _verified(folder)
    except Damaged as error:
        whole = _newest_whole(output_dir)[0]
        way_out = f"=auto, which takes {whole}" if whole else "=null to start over"
        raise InputError(
            f"{error}; name another checkpoint, or set resume_from_checkpoint{way_out}"
        ) from error


def _verified(folder: Path) -> StateFile:
    verify(folder)
    saved = read_state_file(folder)
    num_agents = num_agents_of(read_manifest(folder))
    if num_agents != saved.config.num_agents:
        raise Damaged(
            f"{folder / STATE_FILE}: num_agents is {saved.config.num_agents}, and {num_agents} are saved"
        )
    return saved


def _ways_out(config: Config) -> str:
    """The remedies for a checkpoint of another run. A named checkpoint is used whatever the output_dir."""
    start_over = "start over with resume_from_checkpoint=null"
    return start_over if config.resume_from_checkpoint != "auto" else f"{start_over} or another output_dir"


def _shown(value: object) -> str:
    """A value of the configuration on one line: text with line breaks in it is quoted."""
    text = str(value)
    return (text if text.isprintable() else repr(text))[:200]


def _remedy(others: Mapping[str, object]) -> str:
    """What sets the keys, unless it is too long to copy: where a default has changed, none was set before."""
    settings = as_settings(others)
    return f"set {settings}" if settings.isprintable() and len(settings) <= 200 else "set it back"


def refuse_another_run(saved: StateFile, config: Config, run: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError where the checkpoint is not of this run, with the key, both values and the remedy."""

    def refuse(what: str, ours: object, theirs: object, remedy: str = "set it back") -> None:
        way_out, output_dir = f"{remedy}, or {_ways_out(config)}", folder.parent.parent
        if (output_dir / "agents").is_dir():  # a finished run
            way_out += f"; to train its agents on: output_dir=runs/another init_adapters_from={output_dir}"
        raise InputError(f"{what} is {_shown(ours)}, but {_shown(theirs)} in {folder}; {way_out}")

    old = saved.config.values()
    ours = config.model_dump()
    others = {
        key: old[key] for key in ours if on_resume(key) is OnResume.MUST_EQUAL and ours[key] != old[key]
    }
    for key in others:  # the first is named, and all of them in the remedy
        refuse(f"key '{key}'", ours[key], old[key], _remedy(others))
    if config.max_train_steps is None and config.epochs != saved.config.epochs:
        refuse("key 'epochs'", config.epochs, saved.config.epochs)
    if run["precision"] != saved.precision:
        back = f"set it to {saved.precision}"  # auto may have decided it
        refuse("key 'mixed_precision'", run["precision"], saved.precision, back)
    sizes = int(config.agent_parallel_size), saved.config.agent_parallel_size
    own_rows = config.batch_size * run["world_size"] // sizes[0]
    old_rows = saved.config.batch_size * saved.world_size // sizes[1]
    processes = "processes / agent_parallel_size" if max(sizes) > 1 else "processes"
    if config.lambda_sw > 0 and own_rows != old_rows:  # the distance compares the rows of a micro-batch
        refuse(f"with lambda_sw above 0, key 'batch_size' x {processes}", own_rows, old_rows)
    own_rows *= config.gradient_accumulation_steps
    old_rows *= saved.config.gradient_accumulation_steps
    if own_rows != old_rows:
        refuse(f"key 'batch_size' x gradient_accumulation_steps x {processes}", own_rows, old_rows)
    for name in ("tokenizer", "data"):
        _refuse_other_fingerprint(name, saved, config, run, folder)


def refuse_another_base(start: Start, run: Mapping[str, Any], config: Config) -> None:
    """Raise InputError where the base is not that of the checkpoint, or not that of another host."""
    refuse_differences({"key 'model_name': the base's fingerprint": run["fingerprints"]["base"]})
    if start.folder is not None and start.saved is not None:
        _refuse_other_fingerprint("base", start.saved, config, run, start.folder)


def _refuse_other_fingerprint(
    name: Literal["tokenizer", "data", "base"],
    saved: StateFile,
    config: Config,
    run: Mapping[str, Any],
    folder: Path,
) -> None:
    if getattr(saved.fingerprints, name) == run["fingerprints"][name]:
        return
    key, what = {
        "tokenizer": ("model_name", "its tokenizer differs from that"),
        "data": ("dataset_name", "its training rows differ from those"),
        "base": ("model_name", "its weights or architecture differ from those"),
    }[name]
    raise InputError(
        f"key '{key}': {getattr(config, key)}: {what} of {folder}, trained with "
        f"{_shown(getattr(saved.config, key))}; restore it, or {_ways_out(config)}"
    )


@announced("restoring the checkpoint")
def restore_run(engine: Engine, start: Start, output_dir: Path) -> None:
    """Put the engine into the state of the checkpoint. A collective call.

    Raises:
        InputError: the checkpoint's tensors are not those of the agents.
    """
    if start.folder is None or start.saved is None:
        return
    folder, steps = start.folder, start.saved.optimizer_step
    states: list[TrainingState] = []
    on_every_process(lambda: states.append(read_tensors(folder, steps)))
    restore_state(engine, states[0])
    engine.accelerator.wait_for_everyone()
    on_first_process(engine.accelerator, lambda: set_aside_later(output_dir, start.step))


def load_best(engine: Engine, output_dir: Path, best: BestStep | None) -> None:
    """Give the agents the weights of the best step's checkpoint, for scoring and export; training ends with
    it.

    Raises:
        InputError: that checkpoint is damaged.
    """
    if best is None:
        return
    folder = output_dir / "checkpoints" / f"step_{best.step:06d}"
    try:
        state = read_tensors(folder, verify(folder).optimizer_step)
    except Damaged as error:
        raise InputError(
            f"{error}; it is the best step's: set load_best_model_at_end=false to export the last "
            "step's agents"
        ) from error
    restore_state(engine, state)
    logger.info("the agents of step %d are the best: %s %.4g", best.step, best.metric, best.value)
