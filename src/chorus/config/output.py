"""Output: what a run writes, where and how often."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.types import NonNegativeInt, PositiveInt

from chorus.config.section import MayChange, Place, Section

TrackerName = Literal[
    "tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]  # Accelerate's


class OutputSettings(Section):
    """What a run writes, where and how often."""

    TITLE: ClassVar[str] = "Output"

    output_dir: MayChange[Place] = "runs/default"
    """The folder for all that a run writes, relative to the working directory."""
    save_steps: MayChange[NonNegativeInt] = 0
    """Write a checkpoint every N optimiser steps, into output_dir/checkpoints; 0: only at the end, and when
    SIGTERM or SIGINT stops the run.
    """
    save_total_limit: MayChange[Annotated[int, Field(ge=2)] | None] = 3
    """Keep this many of the newest checkpoints, at least 2; null keeps all."""
    logging_steps: MayChange[PositiveInt] = 10
    """Log every N optimiser steps."""
    report_to: MayChange[Literal["auto", "none"] | Annotated[list[TrackerName], Field(min_length=1)]] = "auto"
    """Experiment trackers that get every logged row, by Accelerate's names, such as [tensorboard, wandb];
    others are trackio, mlflow, comet_ml, aim, clearml, dvclive and swanlab. auto: tensorboard where it is
    installed. none: no tracker."""
    report: MayChange[bool] = False
    """true: at the end, write output_dir/report.html, a page of pictures of the run: losses, scores,
    calibration, uncertainty, answers. It needs matplotlib. `chorus report output_dir` writes it later."""
    resume_from_checkpoint: MayChange[Place | None] = "auto"
    """auto: resume from the newest whole checkpoint of output_dir, if there is one. A folder: resume from
    that checkpoint. null: a fresh start; an earlier run in output_dir is moved aside."""
