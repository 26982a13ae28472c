"""What a run reports while it trains: the progress bar, train.log, metrics.jsonl and trackers."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import transformers
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from chorus.checkpoint.atomic_files import disk_errors, finite_or_null, json_lines, write_text
from chorus.checkpoint.metrics_file import LossRow, loss_rows, rows_up_to
from chorus.checkpoint.store import REMEDY
from chorus.collectives import on_first_process
from chorus.errors import RunError
from chorus.monitoring.memory import memory_line, memory_usage
from chorus.monitoring.ruin import RuinWatch
from chorus.monitoring.trackers import Trackers

logger = logging.getLogger(__name__)
LOG_FILE = "train.log"
PROBLEMS_FILE = "problems.jsonl"


class RunLog:
    """The silent log of every process but the first. Write errors of the first process are raised on all."""

    def __init__(self, accelerator: Accelerator | None = None):
        self._accelerator = accelerator

    def training(self, num_steps: int, start_step: int = 0) -> AbstractContextManager[None]:
        """The context of the training loop: a progress bar of `num_steps`, of which `start_step` are done.

        Rows of later steps are dropped from metrics.jsonl: those steps are taken again. A collective call.
        """
        self._on_first_process(partial(self._cut_back, start_step))
        return self._bar(num_steps, start_step)

    def advance(self, metrics: Mapping[str, Any] | None) -> None:
        """One optimiser step is done. `metrics`: the row of metrics.jsonl on logged steps, a collective call
        then.

        Raises:
            RunError: on every process alike: the first process could not write the row or an earlier log
                line.
        """
        if metrics is not None:
            self._on_first_process(partial(self._write, metrics))

    def profile(self, step: int, report: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Write what the profiler has measured by `step`: a row of metrics.jsonl, and lines for people.

        A collective call; raises as `advance` does.
        """
        self._on_first_process(partial(self._write_profile, step, report, lines))

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """The scores after `step`, as a row of metrics.jsonl of its own, and in a line for people.

        A collective call; raises as `advance` does.
        """
        self._on_first_process(partial(self._write_scores, step, scores))

    def scoring(self, num_problems: int) -> AbstractContextManager[Callable[[str, int], None]]:
        """The context of an evaluation: a progress bar over this process's problems on a terminal.

        It yields a function to call with a description and the number of finished problems.
        """
        return nullcontext(lambda what, count: None)

    def problems(self, problems: Sequence[Mapping[str, Any]]) -> None:
        """Write problems.jsonl: every answerer's answer to each held-out problem.

        A collective call; raises as `advance` does.
        """
        self._on_first_process(partial(self._write_problems, problems))

    def table(self, table: Table) -> None:
        """Print a table. A collective call; raises as `advance` does."""
        self._on_first_process(partial(self._print, table))

    def close(self) -> None:
        """Close files and trackers; called also when the run fails."""

    def _on_first_process(self, act: Callable[[], None]) -> None:
        if self._accelerator is not None:
            on_first_process(self._accelerator, act)

    def _bar(self, num_steps: int, start_step: int) -> AbstractContextManager[None]:
        return nullcontext()

    def _cut_back(self, start_step: int) -> None:
        """The first process' part of `training`."""

    def _write(self, metrics: Mapping[str, Any]) -> None:
        """The first process' part of `advance`."""

    def _write_profile(self, step: int, report: Mapping[str, Any], lines: Sequence[str]) -> None:
        """The first process' part of `profile`."""

    def _write_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """The first process' part of `scores`."""

    def _write_problems(self, problems: Sequence[Mapping[str, Any]]) -> None:
        """The first process' part of `problems`."""

    def _print(self, table: Table) -> None:
        """The first process' part of `table`."""


class _ConsoleHandler(logging.Handler):
    """Log lines above the progress bar, unwrapped, so that they can be searched."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


class _LogFile(logging.FileHandler):
    """train.log. On a full disk the logging module would print a traceback for every line and continue.

    refused: the first write error, raised in the next collective call. Raised at once, it would end only this
    process.
    """

    refused: RunError | None = None

    def handleError(self, record: logging.LogRecord) -> None:
        try:
            with disk_errors(Path(self.baseFilename), len(record.getMessage()), REMEDY):
                raise  # the exception being handled
        except RunError as error:
            self.refused = self.refused or error


class WritingRunLog(RunLog):
    """Writes to the terminal, to train.log and metrics.jsonl in `output_dir`, and to trackers."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, trackers: Trackers):
        super().__init__(accelerator)
        self._trackers, self._device = trackers, accelerator.device
        self._console = Console(stderr=True)
        self._metrics = (output_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._progress = self._new_progress()
        self._ruin = RuinWatch()
        to_terminal = _ConsoleHandler(self._console)
        self._log = _LogFile(output_dir / LOG_FILE, encoding="utf-8")
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._handlers = (to_terminal, self._log)
        for handler in self._handlers:
            logging.getLogger("chorus").addHandler(handler)
        logging.getLogger("chorus").setLevel(logging.INFO)

    def _on_first_process(self, act: Callable[[], None]) -> None:
        def checked() -> None:
            act()
            if self._log.refused is not None:
                raise self._log.refused

        try:
            super()._on_first_process(checked)
        except RunError:
            self._trackers.abandon()
            raise

    def _new_progress(self, is_transient: bool = False) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        remaining = TimeRemainingColumn()
        return Progress(*columns, remaining, console=self._console, transient=is_transient)

    @contextmanager
    def scoring(self, num_problems: int) -> Iterator[Callable[[str, int], None]]:
        with ExitStack() as at_exit:
            progress = self._progress
            if not progress.live.is_started:  # only outside of training: a terminal has one live display
                progress = at_exit.enter_context(self._new_progress(is_transient=True))
            task = progress.add_task("scoring", total=num_problems)
            at_exit.callback(progress.remove_task, task)
            yield lambda what, count: progress.update(task, description=what, advance=count, refresh=True)

    @contextmanager
    def _bar(self, num_steps: int, start_step: int) -> Iterator[None]:
        with self._progress:
            self._task = self._progress.add_task("training", total=num_steps, completed=start_step)
            yield

    def _cut_back(self, start_step: int) -> None:
        """Keep the rows up to `start_step`. A last line truncated by a kill is dropped, too."""
        self._metrics.close()
        path = Path(self._metrics.name)
        kept = rows_up_to(path, start_step)
        with disk_errors(path, len(kept), REMEDY):
            write_text(path, kept)
        self._ruin = RuinWatch()
        for row in loss_rows(path, kept):
            self._ruin.look_at(row)
        self._metrics = path.open("a", encoding="utf-8")

    def advance(self, metrics: Mapping[str, Any] | None) -> None:
        self._progress.advance(self._task)
        super().advance(metrics)

    def _write(self, metrics: Mapping[str, Any]) -> None:
        # JSON has no infinity (the first gradient norms under fp16) and no NaN (a skipped loss).
        numbers = {f"task_loss_agent_{k}": loss for k, loss in enumerate(metrics["task_loss_per_agent"])}
        numbers |= {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        if isinstance(metrics["lr"], list):
            numbers |= {f"lr_agent_{k}": lr for k, lr in enumerate(metrics["lr"])}
        self._append(metrics, numbers)
        self._progress.update(self._task, description=f"loss {metrics['loss']:.4f}")
        swd = "" if metrics["swd"] is None else f"  swd {metrics['swd']:.4f}"
        losses = " ".join(f"{loss:.4f}" for loss in metrics["task_loss_per_agent"])
        logger.info(
            f"step {metrics['step']}  loss {metrics['loss']:.4f}  agents {losses}{swd}  lr "
            f"{_lr_in_words(metrics['lr'])}  grad norm {metrics['grad_norm']:.2f}  "
            f"{metrics['agent_tokens_per_second']:,.0f} agent-tokens/s"
        )
        if metrics["swd"] is not None and isfinite(metrics["task_loss"]):
            ruin = self._ruin.look_at(LossRow.model_validate(metrics))
            if ruin is not None:
                logger.warning(ruin)
        if "peak_memory_gib" in metrics:
            logger.info(memory_line(metrics["step"], self._device, memory_usage(self._device)))

    def _write_profile(self, step: int, report: Mapping[str, Any], lines: Sequence[str]) -> None:
        self._append({"step": step, "profile": report}, dict(_flat("profile", report)))
        logger.info("profiled\n%s", "\n".join(lines))

    def _write_scores(self, step: int, scores: Mapping[str, float]) -> None:
        finite = {f"eval/{name}": value for name, value in scores.items() if value == finite_or_null(value)}
        self._append({"step": step, "scores": dict(scores)}, finite)
        shown = [
            f"{name.removesuffix('/cls/Acc')} {value:.1%}"
            for name, value in scores.items()
            if name.endswith("/cls/Acc") and "/calibrated/" not in name
        ]
        logger.info("step %d  right answers: %s", step, "  ".join(shown))

    def _write_problems(self, problems: Sequence[Mapping[str, Any]]) -> None:
        text, path = json_lines(problems), Path(self._metrics.name).with_name(PROBLEMS_FILE)
        with disk_errors(path, len(text), REMEDY):
            write_text(path, text)

    def _append(self, row: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        line = json.dumps(finite_or_null(row), allow_nan=False) + "\n"
        with disk_errors(Path(self._metrics.name), len(line), REMEDY):
            self._metrics.write(line)
            self._metrics.flush()
            self._trackers.log(numbers, row["step"])

    def _print(self, table: Table) -> None:
        self._console.print(table)

    def close(self) -> None:
        self._trackers.close()
        for file in (self._metrics, *self._handlers):
            if isinstance(file, logging.Handler):
                logging.getLogger("chorus").removeHandler(file)
            with suppress(OSError):  # the buffer fails again on a full disk, which has been reported
                file.close()


def _lr_in_words(lr: float | list[float]) -> str:
    """The learning rate, or the range of those of all agents."""
    return f"{min(lr):.2e} to {max(lr):.2e}" if isinstance(lr, list) else f"{lr:.2e}"


def _flat(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a nested report by path, for trackers."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for name, inner in value.items():
        yield from _flat(f"{path}/{name}", inner)


def quiet_libraries() -> None:
    """Process-wide: hide libraries' deprecation notices, and each process's progress bar of the loading."""
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"transformers|torch|accelerate|peft|deepspeed"
    )
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It says at every product in 8 bits that the input is cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def open_run_log(
    accelerator: Accelerator,
    output_dir: Path,
    settings: Mapping[str, Any],
    report_to: Sequence[str | GeneralTracker],
) -> RunLog:
    """The log of this process: the first one writes, the others are silent. A collective call.

    Args:
        settings: of the run, for trackers, which get the plain values.
        report_to: trackers, or their names.

    Raises:
        InputError: on every process alike: a tracker does not start.
    """
    plain = {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str))}
    logs: list[RunLog] = []
    on_first_process(
        accelerator,
        lambda: logs.append(WritingRunLog(accelerator, output_dir, Trackers(report_to, output_dir, plain))),
    )
    if logs:
        return logs[0]
    logging.getLogger("chorus").addHandler(logging.NullHandler())
    return RunLog(accelerator)
