"""All keys of `configs.yaml`: the sections of this package, in the file's order."""

from pydantic.types import PositiveInt

from chorus.config.adapters import AdapterSettings
from chorus.config.data import DataSettings
from chorus.config.engine import EngineSettings
from chorus.config.evaluation import EvaluationSettings
from chorus.config.execution import ExecutionSettings
from chorus.config.instruments import InstrumentSettings
from chorus.config.model import ModelSettings
from chorus.config.objective import ObjectiveSettings
from chorus.config.output import OutputSettings
from chorus.config.section import OnResume, Section
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


class Config(  # the last section first: pydantic takes the keys of the last base first
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
    """Every key of a run. A section is a base class, so a room that reads one takes a `Config` as it is."""


class RunConfig(Config):
    """A configuration in which `num_agents` is decided."""

    num_agents: PositiveInt = 4  # pyright: ignore[reportIncompatibleVariableOverride]  (frozen, so never assigned)


def on_resume(key: str) -> OnResume:
    """Whether a resumed run may change this key."""
    marks = [mark for mark in Config.model_fields[key].metadata if isinstance(mark, OnResume)]
    return marks[0] if marks else OnResume.MUST_EQUAL
