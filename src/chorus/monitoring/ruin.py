"""Detect a diversity reward that drives the task loss up: lambda_sw is too large.

The objective is task loss - lambda x R_SW. With a large lambda the optimiser trades task loss for distance,
and the objective falls while the agents forget the task. In metrics.jsonl the task loss stays above its best
row, and since then the reward has grown by more than the loss.
"""

from typing import NamedTuple

from chorus.checkpoint.metrics_file import LossRow

# A rise counts if it exceeds this fraction of the best loss and of the loss's decrease so far,
SHARE = 0.25
# and this multiple of the mean move against the trend. With normal noise two consecutive rows do so by chance
# once in a billion.
TIMES_NOISE = 6.0


class _Moves(NamedTuple):
    """How far the loss moved from row to row, in nats: the sum and the number of some moves."""

    total: float = 0.0
    number: int = 0

    def plus(self, moved: float) -> "_Moves":
        return _Moves(self.total + moved, self.number + 1)

    def and_also(self, other: "_Moves") -> "_Moves":
        return _Moves(self.total + other.total, self.number + other.number)


class RuinWatch:
    """Reads the logged rows in order and warns once, at the row that shows divergence from the task.

    A resumed run first passes it the earlier rows, so that it knows the best row and whether it has warned.
    Its memory does not grow with the run.
    """

    def __init__(self) -> None:
        self.has_spoken = False
        self._first: LossRow | None = None
        self._best: LossRow | None = None
        self._last: LossRow | None = None
        self._rows_above = 0
        # Noise is estimated from moves against the trend: up before the best row, and down after it.
        self._up_before = self._up_since = self._down_since = _Moves()

    def look_at(self, row: LossRow) -> str | None:
        """A warning, at the first row that shows the ruin; else None. Each row is a mean over steps.

        Ruin is that this row and the one before it lie above the best row by a quarter of its loss, by a
        quarter of what the loss has fallen by since the first row, and by six times the usual move against
        the trend; and that the reward has grown since the best row by at least what the loss has risen by. So
        a run whose lambda x R_SW is small compared with its loss is never called ruined, whatever its noise.
        """
        first, best, last = self._first or row, self._best or row, self._last or row
        self._first, self._last = first, row
        if row.task_loss <= best.task_loss:
            self._best, self._rows_above = row, 0
            self._up_before = self._up_before.and_also(self._up_since)
            self._up_since = self._down_since = _Moves()
            return None
        moved = row.task_loss - last.task_loss
        if moved > 0:
            self._up_since = self._up_since.plus(moved)
        else:
            self._down_since = self._down_since.plus(-moved)
        self._rows_above = self._rows_above + 1 if self._is_above(row, best, first) else 0
        if self._rows_above < 2 or self.has_spoken:
            return None
        self.has_spoken = True
        return _line(best, row)

    def _is_above(self, row: LossRow, best: LossRow, first: LossRow) -> bool:
        against = self._up_before.and_also(self._down_since)
        noise = against.total / max(against.number, 1)
        fallen = first.task_loss - best.task_loss
        least = max(SHARE * best.task_loss, SHARE * fallen, TIMES_NOISE * noise)
        return least <= row.task_loss - best.task_loss <= row.reward - best.reward


def _line(best: LossRow, now: LossRow) -> str:
    # At this lambda, the distance that the agents have reached would be worth a tenth of the best loss.
    remedy = min(now.lambda_sw / 10, 0.1 * best.task_loss / now.swd)
    return (
        f"step {now.step}: lambda_sw is too large: the task loss has risen from {best.task_loss:.4g} (step "
        f"{best.step}) to {now.task_loss:.4g}, while the reward lambda_sw x swd has grown from "
        f"{best.reward:.3g} to {now.lambda_sw:.3g} x {now.swd:.3g} = {now.reward:.3g} and pays for it; stop "
        f"this run, and start over with lambda_sw={remedy:.1g} or less and resume_from_checkpoint=null"
    )
