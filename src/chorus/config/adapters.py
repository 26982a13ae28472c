"""Adapters and agents: how many agents there are, and what an adapter is."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic.types import PositiveFloat, PositiveInt

from chorus.config.section import MayChange, Probability, Section, Text

Modules = Annotated[list[Text], Field(min_length=1)] | Literal["all-linear"]


class AdapterSettings(Section):
    """How many agents there are, and what an adapter is."""

    TITLE: ClassVar[str] = "Adapters and agents"

    num_agents: PositiveInt | Literal["auto"] = 4
    """K, the number of LoRA agents trained together over the one base. auto: as many as fit, up to 64, by a forecast
    and, on a GPU, by a measured step; a resumed run keeps the number of its checkpoint."""
    memory_fraction: MayChange[Annotated[float, Field(gt=0, le=1)]] = 0.9
    """What num_agents auto may fill of the smallest GPU, or of the free RAM where there is none, and beyond
    which the dry run fails; above 0, up to 1."""
    lora_rank: PositiveInt = 8
    """Rank R of every adapter."""
    lora_alpha: PositiveFloat = 16.0
    """An adapter's output is scaled by lora_alpha / lora_rank."""
    lora_dropout: Probability = 0.0
    """Dropout on the input of every adapter in training, seeded for each agent and step; from 0 (off) to below 1."""
    lora_target_modules: Modules = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """The linear layers that get an adapter: a list of module names, or all-linear for all but the head."""
    initialize_adapters_rand: bool = False
    """false: PEFT's own start, A Kaiming-uniform and B zero, with a different seed for each agent. true: A and B both
    normal with standard deviation 0.02, so that the agents differ from the first step."""
    dropconnect_p: Probability = 0.0
    """DropConnect: the probability with which each weight of A and B is dropped, the others scaled by 1/(1-p); from 0
    (off) to below 1. The masks are new at every optimiser step, off in evaluation, and never in a saved file."""

    @field_validator("lora_target_modules")
    @classmethod
    def _names_no_module_twice(cls, modules: list[str] | str) -> list[str] | str:
        if isinstance(modules, list) and len(set(modules)) < len(modules):
            raise ValueError("a module is in it twice; name each one once")
        return modules
