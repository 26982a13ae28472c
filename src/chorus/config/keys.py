"""All keys of `configs.yaml`: the sections of this package, in the file's order."""

from functools import cache
from typing import Annotated, Any

from pydantic import Field
from pydantic.types import PositiveInt

from chorus.config.adapters import MOST_AGENTS, AdapterSettings
from chorus.config.data import DataSettings
from chorus.config.engine import EngineSettings
from chorus.config.evaluation import EvaluationSettings
from chorus.config.execution import ExecutionSettings
from chorus.config.instruments import InstrumentSettings
from chorus.config.model import ModelSettings
from chorus.config.objective import ObjectiveSettings
from chorus.config.output import OutputSettings
from chorus.config.section import ComparedByEffect, OnResume, Section
from chorus.config.training import TrainingSettings

SECTIONS: tuple[type[Section], ...] = (
    ModelSettings,
    AdapterSettings,
    ExecutionSettings,
    ObjectiveSettings,
    DataSettings,
    TrainingSettings,
    EvaluationSettings,
    OutputSettings,
    EngineSettings,
    InstrumentSettings,
)


class LoopSettings(InstrumentSettings, EngineSettings, OutputSettings, TrainingSettings, ObjectiveSettings):
    """The sections that the training loop and its hooks read."""


class Config(  # in reverse: pydantic takes the keys of the last base class first
    LoopSettings,
    InstrumentSettings,
    EngineSettings,
    OutputSettings,
    EvaluationSettings,
    TrainingSettings,
    DataSettings,
    ObjectiveSettings,
    ExecutionSettings,
    AdapterSettings,
    ModelSettings,
):
    """Every key of a run. Sections are base classes, so a function that takes a section also takes a
    `Config`.
    """


class RunConfig(Config):
    """A configuration in which `num_agents` and `agent_parallel_size` are decided."""

    num_agents: Annotated[int, Field(ge=1, le=MOST_AGENTS)] = 4  # pyright: ignore[reportIncompatibleVariableOverride]  (frozen, so never assigned)
    agent_parallel_size: ComparedByEffect[PositiveInt] = 1  # pyright: ignore[reportIncompatibleVariableOverride]


def on_resume(key: str) -> OnResume:
    """Whether a resumed run may change this key."""
    marks = [mark for mark in Config.model_fields[key].metadata if isinstance(mark, OnResume)]
    return marks[0] if marks else OnResume.MUST_EQUAL


@cache
def schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of every key's values, derived from its field."""
    return Config.model_json_schema()["properties"]


def is_text(key: str) -> bool:
    """Whether every value of this key is text of any kind, apart from null."""
    kinds = schemas()[key].get("anyOf", [schemas()[key]])
    return all(kind.get("type") == "null" or _is_any_text(kind) for kind in kinds) and any(
        map(_is_any_text, kinds)
    )


def is_nullable(key: str) -> bool:
    """Whether null is a value of this key."""
    return any(kind.get("type") == "null" for kind in schemas()[key].get("anyOf", ()))


def _is_any_text(kind: dict[str, Any]) -> bool:
    return kind.get("type") == "string" and not {"enum", "const"} & kind.keys()
