"""What a run tells while it trains: the progress bar, train.log, metrics.jsonl and the tracker."""

import fcntl
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from chorus.checkpoint.atomic_files import disk_errors, write_text
from chorus.checkpoint.output_dir import LOG_FILE
from chorus.checkpoint.store import REMEDY
from chorus.collectives import on_first_process
from chorus.errors import RunError
from chorus.monitoring.memory import memory_line, memory_usage

logger = logging.getLogger(__name__)


class RunLog:
    """Keeps silent, on every process but the first. What the first one's disk refuses is raised on all of them."""

    def __init__(self, accelerator: Accelerator | None = None):
        self._accelerator = accelerator

    def training(self, num_steps: int, start_step: int = 0) -> AbstractContextManager[None]:
        """The context of the training loop: a progress bar of `num_steps`, of which `start_step` are done.

        What metrics.jsonl holds of later steps is dropped: they are taken again. A collective call, as `advance` is.
        """
        self._on_first_process(partial(self._cut_back, start_step))
        return self._bar(num_steps, start_step)

    def advance(self, metrics: Mapping[str, Any] | None) -> None:
        """One optimiser step is done; `metrics` on logged steps: a row of metrics.jsonl, and a collective call.

        Raises:
            RunError: on every process alike: the first one's disk did not take the row, or a line of train.log before.
        """
        if metrics is not None:
            self._on_first_process(partial(self._write, metrics))

    def profile(self, step: int, report: Mapping[str, Any], lines: Sequence[str]) -> None:
        """What the profiler has measured by `step`, as a row of metrics.jsonl of its own, and in lines for people.

        A collective call; raises as `advance` does.
        """
        self._on_first_process(partial(self._write_profile, step, report, lines))

    def table(self, table: Table) -> None:
        """Print a table. A collective call; raises as `advance` does."""
        self._on_first_process(partial(self._print, table))

    def close(self) -> None:
        """Leave the terminal and the files in order; called also when the run fails."""

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

    def _print(self, table: Table) -> None:
        """The first process' part of `table`."""


class _ConsoleHandler(logging.Handler):
    """Log lines above the progress bar, each on one line whatever the width, so that they can be searched."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


class _LogFile(logging.FileHandler):
    """train.log. logging's own way with a full disk is a traceback for every line, and to go on.

    refused: the disk's first error. A line may be written between two collective calls: raised there, it would end this
    process alone.
    """

    refused: RunError | None = None

    def handleError(self, record: logging.LogRecord) -> None:
        try:
            with disk_errors(Path(self.baseFilename), len(record.getMessage()), REMEDY):
                raise  # what is being handled
        except RunError as error:
            self.refused = self.refused or error


class WritingRunLog(RunLog):
    """Writes to the terminal, to train.log and metrics.jsonl in `output_dir`, and to Accelerate's trackers."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, settings: Mapping[str, Any]):
        super().__init__(accelerator)
        self._track, self._trackers, self._device = accelerator.log, accelerator.trackers, accelerator.device
        self._console = Console(stderr=True)
        self._metrics = (output_dir / "metrics.jsonl").open("a", encoding="utf-8")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=self._console)
        to_terminal = _ConsoleHandler(self._console)
        self._log = _LogFile(output_dir / LOG_FILE, encoding="utf-8")
        fcntl.lockf(self._log.stream, fcntl.LOCK_EX)  # pyright: ignore  (`export.is_at_work` asks for it)
        self._log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._handlers = (to_terminal, self._log)
        for handler in self._handlers:
            logging.getLogger("chorus").addHandler(handler)
        logging.getLogger("chorus").setLevel(logging.INFO)
        plain = {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str))}
        accelerator.init_trackers("chorus", config=plain)

    def _on_first_process(self, act: Callable[[], None]) -> None:
        def checked() -> None:
            act()
            if self._log.refused is not None:
                raise self._log.refused

        try:
            super()._on_first_process(checked)
        except RunError:
            self._trackers.clear()  # at the end they would try again, and their error would hide this one
            raise

    @contextmanager
    def _bar(self, num_steps: int, start_step: int) -> Iterator[None]:
        with self._progress:
            self._task = self._progress.add_task("training", total=num_steps, completed=start_step)
            yield

    def _cut_back(self, start_step: int) -> None:
        """Keep the rows up to `start_step`. A last line that a kill has cut short goes with the later ones."""
        self._metrics.close()
        path = Path(self._metrics.name)
        kept = "".join(
            line for line in path.read_text(encoding="utf-8").splitlines(True) if _step_of(line) <= start_step
        )
        with disk_errors(path, len(kept), REMEDY):
            write_text(path, kept)
        self._metrics = path.open("a", encoding="utf-8")

    def advance(self, metrics: Mapping[str, Any] | None) -> None:
        self._progress.advance(self._task)
        super().advance(metrics)

    def _write(self, metrics: Mapping[str, Any]) -> None:
        # JSON knows neither infinity, as the first gradient norms are in fp16, nor the NaN of a loss that is skipped.
        row = {name: _null_where_no_number(value) for name, value in metrics.items()}
        numbers = {f"task_loss_agent_{k}": loss for k, loss in enumerate(metrics["task_loss_per_agent"])}
        numbers |= {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        self._append(row, numbers)
        self._progress.update(self._task, description=f"loss {metrics['loss']:.4f}")
        swd = "" if metrics["swd"] is None else f"  swd {metrics['swd']:.4f}"
        losses = " ".join(f"{loss:.4f}" for loss in metrics["task_loss_per_agent"])
        logger.info(
            f"step {metrics['step']}  loss {metrics['loss']:.4f}  agents {losses}{swd}  lr {metrics['lr']:.2e}  "
            f"grad norm {metrics['grad_norm']:.2f}  {metrics['agent_tokens_per_second']:,.0f} agent-tokens/s"
        )
        if "peak_memory_gib" in metrics:
            logger.info(memory_line(metrics["step"], self._device, memory_usage(self._device)))

    def _write_profile(self, step: int, report: Mapping[str, Any], lines: Sequence[str]) -> None:
        self._append({"step": step, "profile": report}, dict(_flat("profile", report)))
        logger.info("profiled\n%s", "\n".join(lines))

    def _append(self, row: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
        line = json.dumps(row, allow_nan=False) + "\n"
        with disk_errors(Path(self._metrics.name), len(line), REMEDY):
            self._metrics.write(line)
            self._metrics.flush()
            self._track(dict(numbers), step=row["step"])

    def _print(self, table: Table) -> None:
        self._console.print(table)

    def close(self) -> None:
        for file in (self._metrics, *self._handlers):
            if isinstance(file, logging.Handler):
                logging.getLogger("chorus").removeHandler(file)
            with suppress(OSError):  # what a full disk has refused is tried once more, and has been spoken of
                file.close()


def _flat(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a nested report, by path, as trackers want them."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for name, inner in value.items():
        yield from _flat(f"{path}/{name}", inner)


def _null_where_no_number(value: Any) -> Any:
    if isinstance(value, list):
        return [_null_where_no_number(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def quiet_libraries() -> None:
    """Keep the terminal for what concerns the user: not the libraries' deprecation notices to each other, nor a
    progress bar for every process that loads the base."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch|accelerate|peft|deepspeed")
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def open_run_log(accelerator: Accelerator, output_dir: Path, settings: Mapping[str, Any]) -> RunLog:
    """The journal of this process: one writes, the others keep silent (but for their warnings' log level)."""
    if accelerator.is_main_process:
        return WritingRunLog(accelerator, output_dir, settings)
    logging.getLogger("chorus").addHandler(logging.NullHandler())
    return RunLog(accelerator)
