"""The results of a finished run: `ensemble.json` and the agents that it names.

`ensemble.json` holds the agents, their weights in the mixture, and their scores.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator
from pydantic.types import PositiveFloat, PositiveInt

from chorus.checkpoint.manifest import ADAPTER_CONFIG, ADAPTER_FILE, Entry, entry_of, num_agents_of
from chorus.checkpoint.untrusted_files import Damaged, UntrustedModel, parse, read_bytes
from chorus.model.adapters import adapter_name

ENSEMBLE_FILE = "ensemble.json"

Weight = Annotated[float, Field(ge=0, le=1)]


class Scores(UntrustedModel):
    """Scores by answerer, before and after training; empty where no held-out problem was scored."""

    before: dict[str, JsonValue]
    after: dict[str, JsonValue]


class EnsembleFile(UntrustedModel):
    """The entries that are read back. `evaluation` is written last, once the final evaluation is done."""

    agents: Annotated[list[str], Field(min_length=1)]
    weights: list[Weight]
    base_model: str
    temperature: PositiveFloat = 1.0
    evaluation: Scores | None = None

    @model_validator(mode="after")
    def _names_its_own_agents(self) -> "EnsembleFile":
        if self.agents != [f"agents/{adapter_name(agent)}" for agent in range(len(self.agents))]:
            raise ValueError(
                f"agents are {self.agents[:3]}, where agents/{adapter_name(0)}, ... were expected"
            )
        if len(self.weights) != len(self.agents) or not math.isclose(sum(self.weights), 1, abs_tol=1e-3):
            raise ValueError(
                f"{len(self.weights)} weights of sum {sum(self.weights):.4g} for {len(self.agents)} agents"
            )
        return self


def read_ensemble_file(output_dir: Path) -> EnsembleFile:
    """Read `output_dir/ensemble.json`.

    Raises:
        Damaged: it is missing, or differs from what a run writes.
    """
    return parse(output_dir / ENSEMBLE_FILE, read_bytes(output_dir, ENSEMBLE_FILE), EnsembleFile)


class AdapterConfig(UntrustedModel):
    """PEFT's `adapter_config.json`: the entries without which an adapter cannot be loaded."""

    peft_type: Literal["LORA"]
    r: PositiveInt
    lora_alpha: PositiveFloat
    target_modules: Annotated[list[str], Field(min_length=1)] | str


def refuse_unfinished(output_dir: Path, entries: Mapping[str, Entry]) -> None:
    """Raise Damaged unless the run's agents and scores are complete in `output_dir`.

    Args:
        entries: the manifest of the run's last checkpoint, whose agents are the ones exported.
    """
    ensemble = read_ensemble_file(output_dir)
    file = output_dir / ENSEMBLE_FILE
    if ensemble.evaluation is None:
        raise Damaged(f"{file}: has no entry 'evaluation'")
    if len(ensemble.agents) != num_agents_of(entries):
        raise Damaged(
            f"{file}: names {len(ensemble.agents)} agents, and the checkpoint has {num_agents_of(entries)}"
        )
    for agent in ensemble.agents:
        config, weights = f"{agent}/{ADAPTER_CONFIG}", f"{agent}/{ADAPTER_FILE}"
        parse(output_dir / config, read_bytes(output_dir, config), AdapterConfig)
        if entry_of(output_dir, weights, entries[weights].size) != entries[weights]:
            raise Damaged(f"{output_dir / weights}: differs from the agent of the last checkpoint")
