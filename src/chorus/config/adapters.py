"""Adapters and agents: how many agents there are, and what an adapter is."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic.types import NonNegativeInt, PositiveFloat

from chorus.config.per_agent import PerAgent, largest
from chorus.config.section import MayChange, Probability, Section, Text

MOST_AGENTS = 4096
Modules = Annotated[list[Text], Field(min_length=1)] | Text


class AdapterSettings(Section):
    """How many agents there are, and what an adapter is."""

    TITLE: ClassVar[str] = "Adapters and agents"

    num_agents: Annotated[int, Field(ge=1, le=MOST_AGENTS)] | Literal["auto"] = 4
    """K, the number of LoRA agents trained together over the one base. auto: as many as fit, up to 64, by a
    forecast and, on a GPU, by a measured step; a resumed run keeps the number of its checkpoint."""
    memory_fraction: MayChange[Annotated[float, Field(gt=0, le=1)]] = 0.9
    """What num_agents auto may fill of the smallest GPU, or of the free RAM where there is none, and beyond
    which the dry run fails; above 0, up to 1."""
    lora_rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank R of every adapter."""
    lora_alpha: PerAgent[PositiveFloat] = 16.0
    """An adapter's output is scaled by lora_alpha / lora_rank. A number, or a list with one for each
    agent.
    """
    use_rslora: bool = False
    """true: scaled by lora_alpha / sqrt(lora_rank) instead, so
    that a high rank does not shrink it (rsLoRA)."""
    lora_dropout: PerAgent[Probability] = 0.0
    """Dropout on the input of every adapter in training, seeded for each agent and step; from 0 (off) to
    below 1. A number, or a list with one for each agent."""
    lora_target_modules: Modules = "auto"
    """The linear layers of the text model that get an adapter. auto: those of attention and MLP, whatever
    their names. all-linear: all but the head. A list: module names, or ends of paths such as
    self_attn.q_proj. Other text: a regular expression over whole paths, as PEFT reads it. Experts held as
    parameters get none; the log says so."""
    lora_exclude_modules: list[Text] | Text = Field(default=[])
    """Layers that get no adapter though lora_target_modules names them: a list of names or ends of paths, or
    a regular expression over whole paths."""
    layers_to_transform: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """Only in these decoder layers, counted from 0; null for all."""
    initialize_adapters_rand: bool = False
    """false: PEFT's own start, A Kaiming-uniform and B zero, with a different seed for each agent. true: A
    and B both normal with standard deviation 0.02, so that the agents differ from the first step."""
    lora_init_gain: PerAgent[PositiveFloat] = 1.0
    """Factor on the standard deviation of A's initial values; B starts as it does without. A number, or a
    list with one for each agent."""
    init_adapters_from: Annotated[list[Text], Field(min_length=1)] | Text | None = None
    """Start from existing adapters: a run's output_dir, or a list of PEFT LoRA folders, one for each agent.
    Only their weights: optimizer, schedule and steps start anew, on any rows. null: new adapters.
    """
    dropconnect_p: PerAgent[Probability] = 0.0
    """DropConnect: the probability with which each weight of A and B is dropped, the others scaled by
    1/(1-p); from 0 (off) to below 1. The masks are new at every optimiser step, off in evaluation, and never
    in a saved file. A number, or a list with one for each agent."""

    @property
    def drops_inputs(self) -> bool:
        """Whether an agent has dropout on the inputs of its adapters."""
        return largest(self.lora_dropout) > 0

    @field_validator("init_adapters_from")
    @classmethod
    def _brings_its_own_A(
        cls, folders: list[str] | str | None, info: ValidationInfo
    ) -> list[str] | str | None:
        if folders is not None and info.data.get("lora_init_gain", 1.0) != 1.0:
            raise ValueError("these adapters bring their own A; set lora_init_gain to 1")
        return folders

    @field_validator("lora_target_modules", "lora_exclude_modules")
    @classmethod
    def _names_modules(cls, modules: list[str] | str) -> list[str] | str:
        if isinstance(modules, list):
            if len(set(modules)) < len(modules):
                raise ValueError("a module is in it twice; name each one once")
            return modules
        if modules in ("auto", "all-linear"):
            return modules
        if modules in ("all", "all_linear", "linear"):  # as other tools write it
            raise ValueError("write all-linear")
        if re.fullmatch(r"[\w.-]+", modules):  # no expression, but a name without its brackets
            raise ValueError("write [one, another] for names, or a regular expression such as .*\\.q_proj")
        try:
            re.compile(modules)
        except re.error as error:
            raise ValueError(
                f"it is not a regular expression ({error}); write [one, another] for names"
            ) from error
        return modules
