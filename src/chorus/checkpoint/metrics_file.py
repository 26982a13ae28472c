"""`metrics.jsonl`, read back when a run resumes: the rows of completed steps are kept."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from chorus.checkpoint.atomic_files import write_text
from chorus.checkpoint.untrusted_files import Damaged, UntrustedModel, open_regular, parse
from chorus.config.section import MOST_STEPS

logger = logging.getLogger(__name__)


class MetricsRow(UntrustedModel):
    """The entry that every row has."""

    step: Annotated[int, Field(ge=0, le=MOST_STEPS)]


class LossRow(MetricsRow):
    """The minimised quantity in a row of losses: task_loss - lambda_sw x swd, means over the steps since the
    previous row. Rows of a run without the distance have no `swd`.
    """

    task_loss: float
    swd: float
    lambda_sw: float

    @property
    def reward(self) -> float:
        return self.lambda_sw * self.swd


def loss_rows(file: Path, lines: str) -> Iterator[LossRow]:
    """The rows of losses among the lines that `rows_up_to` has kept."""
    for line in lines.splitlines():
        with suppress(Damaged):  # a row of scores, or of a loss that was not finite
            yield parse(file, line, LossRow)


def rows_up_to(file: Path, step: int) -> str:
    """The lines of `file` whose step is at most `step`.

    A kill may have cut the last line short; it is dropped. Any other line that is not a row was written by
    someone else: it is dropped with a warning, and the file as it was is kept as `metrics.jsonl.damaged`.

    Raises:
        Damaged: it is not a regular file, or cannot be read.
    """
    with open_regular(file.parent, file.name) as stream:
        content = stream.read().decode(errors="replace")
    lines = content.split("\n")
    kept, bad = [], list[int]()
    for number, line in enumerate(lines, 1):
        try:
            if parse(file, line, MetricsRow).step <= step:
                kept.append(f"{line}\n")
        except Damaged:
            if number < len(lines):  # the last one ends the file, or was cut short
                bad.append(number)
    if bad:
        damaged = file.with_name(f"{file.name}.damaged")
        write_text(damaged, content)
        logger.warning(
            "%s: line %d is not a row of a run and is left out; %s has all of it", file, bad[0], damaged
        )
    return "".join(kept)
