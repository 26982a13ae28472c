"""Instruments: where time and memory go."""

from typing import ClassVar, Literal

from pydantic.types import NonNegativeInt

from chorus.config.section import MayChange, Section


class InstrumentSettings(Section):
    """Where time and memory go."""

    TITLE: ClassVar[str] = "Instruments"

    profile_steps: MayChange[NonNegativeInt] = 0
    """Time this many optimiser steps part by part, after one step of warm-up, and print a summary; 0 is
    off.
    """
    profile_trace: MayChange[bool] = False
    """true: after those, trace two steps with PyTorch's profiler into output_dir/profile: a trace for
    https://ui.perfetto.dev, a flame graph for any browser, the most expensive operators. It slows these two
    down."""
    log_memory_usage: MayChange[bool] = False
    """true: log memory with every logged step: the GPU's, or what is resident where there is none."""
    memory_check: MayChange[Literal["refuse", "warn", "off"]] = "refuse"
    """Before the base is loaded, what the run takes of each device's memory is forecast, in a few seconds.
    refuse: what is more than is free ends the run there, and the line says what would fit. warn: it is said,
    and the run starts. off: no forecast."""
