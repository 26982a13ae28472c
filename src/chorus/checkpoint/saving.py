"""Checkpoints during training: every `save_steps` steps, and before it ends."""

from collections.abc import Callable, Mapping
from typing import Any

from chorus.checkpoint.store import Checkpointer
from chorus.spans import span
from chorus.training.engine import Engine
from chorus.training.nonfinite import SkippedUpdates
from chorus.training.step import StepDone


class PeriodicCheckpoints:
    """Saves every `save_steps` steps (0: never), and whenever an earlier hook asks for a checkpoint."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        engine: Engine,
        skips: SkippedUpdates,
        save_steps: int,
        scores: Callable[[], Mapping[str, Any]],
    ):
        self.checkpointer, self.engine, self.skips = checkpointer, engine, skips
        self.save_steps, self.scores = save_steps, scores

    def after_step(self, step: StepDone) -> None:
        """Save if it is due, which is a collective call.

        Raises:
            RunError: on every process alike: the write failed, or a value is not finite.
        """
        if step.must_save or step.is_due(self.save_steps):
            self.skips.settle(step)
            with span("checkpoint"):
                self.checkpointer.save(
                    self.engine, step.number, step.batch.epoch, self.skips.in_a_row, self.scores()
                )
