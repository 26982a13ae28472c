"""What is said of skipped updates, and when too many steps in a row had one."""

import logging
import math
from typing import TYPE_CHECKING, Any

from chorus.errors import RunError
from chorus.training.optimizer import StepNorms

if TYPE_CHECKING:
    from chorus.training.engine import Engine


logger = logging.getLogger(__name__)


class SkippedUpdates:
    """Says whose update was skipped at which step, and when that has come about in too many steps in a row.

    How many, `skips_in_a_row`, is kept in `facts`, the entries of `state.json`: going on does not forgive.
    """

    def __init__(self, max_skipped_steps: int, facts: dict[str, Any]):
        self.max_skipped_steps, self._facts = max_skipped_steps, facts
        facts.setdefault("skips_in_a_row", 0)
        self._waiting: list[tuple[int, StepNorms]] = []
        self._since_read = 0
        self._latest = ""

    def look(self, step: int, engine: "Engine", at_once: bool) -> bool:
        """Look at the step before, and `at_once` also at the one that is done; whether the run must end.

        The answer is the same on every process, as the norms are. Under fp16, while the loss scale is above 1, a
        gradient that is no number is how the scale finds its place: no agent is updated, and the step does not count.

        Args:
            step: optimiser steps that are done.
        """
        assert engine.norms is not None
        self._waiting.append((step, engine.norms))
        while len(self._waiting) > (0 if at_once else 1):
            step, norms = self._waiting.pop(0)
            bad = {agent: norm for agent, norm in enumerate(norms.read()) if not math.isfinite(norm)}
            if bad and engine.loss_scale() > 1:
                logger.info("step %d: the gradient overflowed under fp16's loss scale, which shrinks; no update", step)
                continue
            self._facts["skips_in_a_row"] = self._facts["skips_in_a_row"] + 1 if bad else 0
            self._since_read += len(bad)
            if bad:
                self._latest = (
                    f"agent{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}: loss or gradient is no number at step "
                    f"{step} (gradient norm {', '.join(map(str, bad.values()))})"
                )
                logger.warning(
                    "%s; the update was skipped, and no other agent's (%d such steps in a row, max_skipped_steps %d)",
                    *(self._latest, self._facts["skips_in_a_row"], self.max_skipped_steps),
                )
        return self._facts["skips_in_a_row"] > self.max_skipped_steps

    def read(self) -> int:
        """Agents' updates that were skipped since the last reading."""
        count, self._since_read = self._since_read, 0
        return count

    def error(self, step: int, output_dir: str) -> RunError:
        """Why the run ends after `step`, which is saved."""
        return RunError(
            f"{self._latest}; key 'max_skipped_steps' allows {self.max_skipped_steps} steps in a row with a skipped "
            f"update, and this was number {self._facts['skips_in_a_row']}; {output_dir}/checkpoints/step_{step:06d} "
            "holds every agent's last good state; lower lr, or look at the rows of that step"
        )
