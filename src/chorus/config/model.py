"""Model: the frozen base."""

from typing import ClassVar

from chorus.config.section import ComparedByEffect, Section, Text


class ModelSettings(Section):
    """The frozen base."""

    TITLE: ClassVar[str] = "Model"

    model_name: ComparedByEffect[Text] = "assets/tiny-gemma-2"
    """The frozen base: a hub id, or a folder, relative to the working directory. assets/tiny-gemma-2 is bundled."""
