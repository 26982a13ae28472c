"""Execution: how passes are carried out. No key here changes a result, beyond rounding."""

from typing import ClassVar, Literal, get_args

from pydantic import ValidationInfo, field_validator
from pydantic.types import PositiveInt

from chorus.config.section import MayChange, Section

Mode = Literal["fused", "sequential", "parallel"]
MODES: tuple[Mode, ...] = get_args(Mode)
Recompute = Literal["none", "selective", "full"]


class ExecutionSettings(Section):
    """How passes are carried out. No key here changes a result, beyond rounding."""

    TITLE: ClassVar[str] = "Execution"

    parallel_mode: MayChange[Mode] = "fused"
    """How the agents share the base. fused: all agents in one pass over all their rows, the fastest.
    sequential: one agent at a time, the least memory. parallel: K models over the same frozen storage, for
    bases that fused refuses."""
    agents_per_pass: MayChange[PositiveInt | None] = None
    """fused: at most this many agents in one pass, to save memory; each pass is then computed twice, except
    with gradient_checkpointing full, which computes every layer twice anyway. null: all.
    """
    attn_implementation: MayChange[
        Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"]
    ] = "auto"
    """auto, eager, sdpa, flex_attention or flash_attention_2. auto: with a soft-cap (Gemma-2) eager, and on a
    GPU, for rows of 1,024 tokens or more, flash_attention_2 where it is installed or flex_attention in
    compiled layers; without a soft-cap what transformers takes. The log says what was chosen, and why."""
    gradient_checkpointing: MayChange[Recompute | None] = None
    """What of each decoder layer is recomputed in the backward pass, for less memory and more time. none:
    nothing. selective: all but the results of its products with weights. full: the whole layer. null: none,
    or what use_gradient_checkpointing says.
    """
    use_gradient_checkpointing: MayChange[bool | None] = None
    """The older spelling of gradient_checkpointing: true is
    full, false is none; null leaves it to the other key."""
    compile: MayChange[Literal["auto"] | bool] = "auto"
    """true: have torch compile the decoder layers for training, once for every length that occurs; what it
    cannot compile is an error. auto: on a GPU, where packing or pad_to_multiple_of leaves at most 8 shapes
    and lora_dropout is 0."""
    cuda_graphs: MayChange[Literal["auto"] | bool] = "auto"
    """true: capture a training pass as a CUDA graph and replay it, which saves the host most of its work. The
    graph keeps the memory of a pass. auto: as for compile.
    """

    @field_validator("compile", "cuda_graphs")
    @classmethod
    def _draws_nothing_inside(cls, wanted: bool | str, info: ValidationInfo) -> bool | str:
        if wanted is True and info.data.get("lora_dropout"):
            raise ValueError("dropout draws anew in every pass, and lora_dropout is above 0; set it to auto")
        return wanted

    @field_validator("use_gradient_checkpointing")
    @classmethod
    def _says_what_the_other_spelling_says(cls, wanted: bool | None, info: ValidationInfo) -> bool | None:
        said = info.data.get("gradient_checkpointing")
        if None not in (wanted, said) and said != ("full" if wanted else "none"):
            raise ValueError(
                f"gradient_checkpointing, the same in more words, is {said}; set one of them to null"
            )
        return wanted

    @property
    def recomputation(self) -> Recompute:
        """What `gradient_checkpointing` and its older spelling come to."""
        return self.gradient_checkpointing or ("full" if self.use_gradient_checkpointing else "none")
