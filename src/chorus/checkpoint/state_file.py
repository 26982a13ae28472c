"""`state.json` of a checkpoint: the progress of the run, and what defines it."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, JsonValue, model_validator
from pydantic.types import NonNegativeInt, PositiveInt

from chorus.checkpoint.untrusted_files import UntrustedModel, parse, read_bytes
from chorus.config import Config
from chorus.config.section import MOST_STEPS
from chorus.errors import InputError

FORMAT = 1
STATE_FILE = "state.json"

Steps = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class SavedStep(UntrustedModel):
    """The progress of the run: all that is needed to read the tensors beside it.

    step: optimiser steps that are done. epoch: the epoch of the last one. optimizer_step: AdamW's step count,
    one number or one for each agent; fewer where updates were skipped. skips_in_a_row: number of consecutive
    steps, up to this one, in which some agent's update was skipped.
    """

    format: int
    step: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    epoch: NonNegativeInt = 0
    optimizer_step: Steps | list[Steps]
    skips_in_a_row: Steps = 0

    @model_validator(mode="after")
    def _took_no_more_steps_than_are_done(self) -> "SavedStep":
        taken = self.optimizer_step if isinstance(self.optimizer_step, list) else [self.optimizer_step]
        if not taken or max(taken) > self.step:
            raise ValueError(f"optimizer_step is {self.optimizer_step}, and step is {self.step}")
        if self.skips_in_a_row > self.step:
            raise ValueError(f"skips_in_a_row is {self.skips_in_a_row}, and step is {self.step}")
        return self


class Fingerprints(UntrustedModel):
    """Digests of what the run was trained with. A run that resumes must find the same."""

    tokenizer: Digest
    data: Digest
    base: Digest


class SavedConfig(UntrustedModel):
    """The run's configuration. The keys used in computations are typed; the others are only compared."""

    num_agents: PositiveInt
    model_name: str
    dataset_name: str
    batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    agent_parallel_size: PositiveInt = 1
    epochs: PositiveInt
    max_train_steps: NonNegativeInt | None

    def values(self) -> dict[str, Any]:
        """Every key of the current configuration. A key missing from the file had its default."""
        saved = self.model_dump()
        return {key: saved.get(key, field.default) for key, field in Config.model_fields.items()}


class BestStep(UntrustedModel):
    """The best evaluation so far, by `metric_for_best_model`.

    step: whose checkpoint is kept.
    scorings_since: evaluations since then, none of them better.
    """

    step: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    metric: str
    value: float
    scorings_since: NonNegativeInt = 0


class InitialScores(UntrustedModel):
    """The scores of the initial adapters, and the keys with which they were computed."""

    asked: dict[str, JsonValue]
    report: dict[str, JsonValue]


class StateFile(SavedStep):
    """The whole file: the progress of the run, and what defines it."""

    parallel_mode: str
    engine: str
    world_size: PositiveInt
    precision: Literal["no", "fp16", "bf16"]
    num_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    fingerprints: Fingerprints
    config: SavedConfig
    best: BestStep | None = None
    initial_scores: InitialScores | None = None
    stopped_early: bool = False
    evaluation_due: bool = False  # a signal interrupted the evaluation of this step

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "StateFile":
        if self.step > self.num_steps:
            raise ValueError(f"step is {self.step}, beyond num_steps {self.num_steps}")
        if self.world_size % self.config.agent_parallel_size:
            raise ValueError(
                f"world_size is {self.world_size}, and agent_parallel_size {self.config.agent_parallel_size}"
            )
        if self.config.max_train_steps not in (None, self.num_steps):
            raise ValueError(
                f"num_steps is {self.num_steps}, and max_train_steps {self.config.max_train_steps}"
            )
        return self


class _Format(UntrustedModel):
    format: int


def read_saved_step(folder: Path) -> SavedStep:
    """The progress of the run at this checkpoint.

    Raises:
        Damaged: the file is not as a run writes it.
        InputError: it has a format that this version does not know.
    """
    return _read(folder, SavedStep)


def read_state_file(folder: Path) -> StateFile:
    """All of `state.json`. Raises as `read_saved_step`."""
    return _read(folder, StateFile)


S = TypeVar("S", bound=SavedStep)


def _read(folder: Path, model: type[S]) -> S:
    file, content = folder / STATE_FILE, read_bytes(folder, STATE_FILE)
    found = parse(file, content, _Format).format  # first: another format may have other entries
    if found != FORMAT:
        raise InputError(
            f"{folder}: has checkpoint format {found}, and this version of Chorus reads format {FORMAT}; "
            "resume it with the version that wrote it, or start over with resume_from_checkpoint=null"
        )
    return parse(file, content, model)
