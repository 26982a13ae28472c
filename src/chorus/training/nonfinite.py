"""Skipped updates: logged, and too many consecutive steps with one end the run."""

import logging
import math

from chorus.errors import RunError
from chorus.training.step import StepDone, StepResult

logger = logging.getLogger(__name__)


class SkippedUpdates:
    """Logs which agent's update was skipped at which step, and ends a run after too many such consecutive
    steps.

    The host reads a step's norms one step later, when they have arrived; `settle` also reads those of the
    latest step. The norms, and so the outcome, are the same on every process.

    Args:
        in_a_row: consecutive steps with a skipped update so far; from the checkpoint, for a resumed run.
        output_dir: the folder of the last step's checkpoint, for the error message.
    """

    def __init__(self, max_skipped_steps: int, in_a_row: int, output_dir: str):
        self.max_skipped_steps, self.in_a_row, self.output_dir = max_skipped_steps, in_a_row, output_dir
        self._unread: list[tuple[int, StepResult]] = []
        self._since_taken = 0
        self._latest = ""

    def after_step(self, step: StepDone) -> None:
        """Read the norms of all earlier steps."""
        self._read_unread(step)
        self._unread.append((step.number, step.result))

    def settle(self, step: StepDone) -> None:
        """Read the norms of all steps, including this one. For hooks that wait for the device anyway."""
        self._read_unread(step)

    def take_count(self) -> int:
        """How many updates of agents were skipped since the last call."""
        count, self._since_taken = self._since_taken, 0
        return count

    def _read_unread(self, step: StepDone) -> None:
        for number, result in self._unread:
            self._read(number, result)
            if self.in_a_row > self.max_skipped_steps:
                step.end(self._error(step.number))
        self._unread.clear()

    def _read(self, number: int, result: StepResult) -> None:
        """Under fp16, a gradient overflow with a loss scale above 1 only lowers the scale: no agent steps,
        and the step does not count as skipped.
        """
        bad = {agent: norm for agent, norm in enumerate(result.agent_norms()) if not math.isfinite(norm)}
        if bad and result.loss_scale() > 1:
            logger.info(
                "step %d: the gradient overflowed under fp16's loss scale, which shrinks; no update", number
            )
            return
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self._since_taken += len(bad)
        if bad:
            self._latest = (
                f"agent{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}: loss or gradient is not finite at "
                f"step {number} (gradient norm {', '.join(map(str, bad.values()))})"
            )
            logger.warning(
                "%s; the update was skipped, and no other agent's (%d such steps in a row, "
                "max_skipped_steps %d)",
                *(self._latest, self.in_a_row, self.max_skipped_steps),
            )

    def _error(self, step: int) -> RunError:
        return RunError(
            f"{self._latest}; key 'max_skipped_steps' allows {self.max_skipped_steps} steps in a row with a "
            f"skipped update, and this was number {self.in_a_row}; "
            f"{self.output_dir}/checkpoints/step_{step:06d} holds every agent's last good state; look at "
            "the rows of that step, and start over with a lower lr and resume_from_checkpoint=null"
        )
