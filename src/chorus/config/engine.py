"""Engine: precision, DeepSpeed and the process group."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.types import PositiveInt

from chorus.config.section import ComparedByEffect, MayChange, Place, Section


class EngineSettings(Section):
    """Precision, DeepSpeed and the process group."""

    TITLE: ClassVar[str] = "Engine"

    mixed_precision: ComparedByEffect[Literal["no", "fp16", "bf16", "auto"]] = "auto"
    """no, fp16, bf16 or auto. auto: bf16 on a GPU that has it,
    no elsewhere. no also loads the base in fp32."""
    use_deepspeed: MayChange[Literal["auto"] | bool] = "auto"
    """auto: as the launcher says. true: DeepSpeed, even where the launcher does not ask for it. false: no
    DeepSpeed, and a launcher that asks for it is refused."""
    deepspeed_config_file: MayChange[Place | None] = "ds_config_zero2.json"
    """DeepSpeed's own settings, a JSON file; null for ZeRO-2 with buckets sized to adapters.
    recipes/deepspeed has others, for where memory is short."""
    agent_parallel_size: ComparedByEffect[PositiveInt | Literal["auto"]] = 1
    """A: spread the agents over this many processes, num_agents / A on each; A divides agents and processes.
    Those A processes see the same rows, so a micro-batch has batch_size x processes / A rows. Gradients are
    summed over processes / A processes, and where A is the number of processes, over none. auto: the largest
    A. docs/scaling.md says when it pays.
    """
    collective_timeout_s: MayChange[Annotated[int, Field(ge=1, le=31_536_000)]] = 1800
    """Seconds that a process waits for the others before it ends the run; more than the slowest save or
    evaluation of one of them takes."""
