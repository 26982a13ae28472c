"""Model: the frozen base."""

from typing import ClassVar

from pydantic import ValidationInfo, field_validator

from chorus.config.section import ComparedByEffect, Place, Section


class ModelSettings(Section):
    """The frozen base."""

    TITLE: ClassVar[str] = "Model"

    model_name: ComparedByEffect[Place] = "assets/tiny-gemma-2"
    """The frozen base: a hub id, or a folder, relative to the
    working directory. assets/tiny-gemma-2 is bundled."""
    load_in_4bit: bool = False
    """true: hold the weights of the base's linear layers in 4 bits, NF4 with double quantisation (QLoRA): a
    quarter of the memory, a slower step. It needs the package bitsandbytes. A base that was saved so is
    loaded so without it."""
    load_in_8bit: bool = False
    """true: hold them in 8 bits (LLM.int8): half of the memory, a slower step. It needs bitsandbytes, too."""

    @field_validator("load_in_8bit")
    @classmethod
    def _is_one_of_two(cls, wanted: bool, info: ValidationInfo) -> bool:
        if wanted and info.data.get("load_in_4bit"):
            raise ValueError("load_in_4bit is true as well; set one of them to false")
        return wanted
