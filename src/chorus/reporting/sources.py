"""The data of a report, read from a run's folder, a checkpoint, or a file of scored problems."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chorus.checkpoint.ensemble_file import ENSEMBLE_FILE
from chorus.checkpoint.state_file import STATE_FILE
from chorus.ensemble.evaluate import CALIBRATED, FITTED, UNIFORM, Evaluation
from chorus.errors import InputError
from chorus.monitoring.run_log import PROBLEMS_FILE

METRICS_FILE = "metrics.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """The recorded data of one run.

    Attributes:
        name: for display.
        place: the report's default file.
        steps: rows of losses, in the order of their steps.
        scored: rows of scores, likewise.
        profile: what the profiler measured; empty where it did not.
        evaluation: the final scores; without an answerer where there are none.
        problems: one object for each held-out problem, as `Evaluation.problems` has them.
        config: the run's configuration; empty of a file of problems.
    """

    name: str
    place: Path
    steps: list[Row] = field(default_factory=list)
    scored: list[Row] = field(default_factory=list)
    profile: Row = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    problems: list[Row] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def agents(self) -> list[str]:
        """The names of the agents that have answered problems."""
        answerers = self.problems[0]["answers"] if self.problems else {}
        return [name for name in answerers if name.startswith("agent_") and "/" not in name]

    @property
    def mixture(self) -> str:
        """The name of the mixture that the run uses; empty without one."""
        answerers = self.problems[0]["answers"] if self.problems else {}
        return next((name for name in (FITTED, UNIFORM) if name in answerers), "")

    def answers(self, answerer: str, *, ood: bool, calibrated: bool = False) -> list[Row]:
        """The mixture's answers to the held-out problems, or to those of the second data set."""
        name = f"{answerer}/{CALIBRATED}" if calibrated else answerer
        return [one["answers"][name] for one in self.problems if bool(one.get("ood")) == ood]


def read_run(path: Path, problems: Path | None = None) -> RunRecord:
    """Read the data of a run.

    Args:
        path: an output folder, a checkpoint, or a file that `chorus evaluate --problems FILE` has written.
        problems: such a file, in place of the run's own.

    Raises:
        InputError: it is none of these, or a file cannot be read.
    """
    if path.is_file():
        return RunRecord(path.stem, path.with_suffix(".html"), problems=_read_problems(path))
    if (path / STATE_FILE).is_file():
        return _of_checkpoint(path, problems)
    if not (path / METRICS_FILE).is_file() and not (path / ENSEMBLE_FILE).is_file():
        raise InputError(
            f"{path}: holds neither {METRICS_FILE} nor {ENSEMBLE_FILE}; name an output folder, a checkpoint, "
            "or a file that chorus evaluate --problems FILE has written"
        )
    described = _read_object(path / ENSEMBLE_FILE) if (path / ENSEMBLE_FILE).is_file() else {}
    own = path / PROBLEMS_FILE
    file = problems or (own if own.is_file() else None)
    return RunRecord(
        path.absolute().name,
        path / "report.html",
        **_metrics(path / METRICS_FILE),
        evaluation=_evaluation(described, path / ENSEMBLE_FILE),
        problems=[] if file is None else _read_problems(file),
        config=described.get("config") or {},
    )


def _of_checkpoint(path: Path, problems: Path | None) -> RunRecord:
    """A checkpoint: the run's losses and scores up to its step. Nothing is written into the checkpoint's
    folder.
    """
    state, run = _read_object(path / STATE_FILE), path.absolute().parent.parent
    return RunRecord(
        f"{run.name} at {path.absolute().name}",
        run / f"report_{path.absolute().name}.html",
        **_metrics(run / METRICS_FILE, int(state.get("step", 0))),
        problems=[] if problems is None else _read_problems(problems),
        config=state.get("config") or {},
    )


def _metrics(file: Path, last_step: int | None = None) -> dict[str, Any]:
    rows = list(_objects(file)) if file.is_file() else []
    rows = [row for row in rows if last_step is None or row.get("step", 0) <= last_step]
    profiles = [row["profile"] for row in rows if "profile" in row]
    return {
        "steps": [row for row in rows if "task_loss_per_agent" in row],
        "scored": [row for row in rows if "scores" in row],
        "profile": profiles[-1] if profiles else {},
    }


def _evaluation(described: Row, file: Path) -> Evaluation:
    try:
        return Evaluation.from_report((described.get("evaluation") or {}).get("after") or {})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: its scores cannot be read; remove its entry 'evaluation', or score the run again"
        ) from error


def _read_problems(file: Path) -> list[Row]:
    found = list(_objects(file))
    for number, row in enumerate(found, 1):
        if not isinstance(row.get("answers"), dict) or "prompt" not in row:
            raise InputError(
                f"{file}: line {number} is not a scored problem; write the file with chorus evaluate "
                "--problems"
            )
    return found


def _read_object(file: Path) -> Row:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON; restore it, or remove it") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: is not a JSON object; restore it, or remove it")
    return found


def _objects(file: Path) -> Iterator[Row]:
    """The objects of a file of JSON lines. A last line truncated by a kill is left out."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as text; name another file") from error
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except ValueError as error:
            if number == len(lines) and number > 1:
                return
            raise InputError(f"{file}: line {number} is not valid JSON; remove that line") from error
        if not isinstance(found, dict):
            raise InputError(f"{file}: line {number} is not a JSON object; remove that line")
        yield found
