"""What a run says, in its log, metrics.jsonl, on the terminal
and to trackers; test_meter.py has its numbers."""

import io
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from metric_keys import KEYS
from rich.console import Console
from rich.table import Table

from chorus.errors import RunError
from chorus.monitoring import run_log as run_log_module
from chorus.monitoring.run_log import RunLog, WritingRunLog, open_run_log
from chorus.monitoring.trackers import Trackers

CHORUS = logging.getLogger("chorus")
TABLE = Table("agent 1")


def metrics(step: int, **more: Any) -> dict[str, Any]:
    """A row as the meter makes it."""
    values = [step, 1.9, 2.0, 10.0, 0.01, [1.5, 2.5], 1e-3, 0.5, 0, 1000.0]
    return {**dict(zip(KEYS, values, strict=True)), **more}


class Recorder(GeneralTracker):
    """A tracker of the user's own, as Accelerate takes them."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.is_finished = False
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = dict(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run_log(accelerator: Accelerator, recorder: Recorder, tmp_path: Path) -> Iterator[RunLog]:
    settings = {"lr": 0.1, "dataset_subset": None, "modules": ["a"], "mode": "x"}
    run_log = open_run_log(accelerator, tmp_path, settings, [recorder])
    yield run_log
    run_log.close()


def test_every_logged_step_is_one_json_object_a_line(run_log: RunLog, tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    with run_log.training(3):
        for step in (1, 2, 3):
            run_log.advance(metrics(step) if step != 2 else None)
            assert len(file.read_text().splitlines()) == (1 if step < 3 else 2), (
                "written at once: a crash loses none"
            )
    run_log.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [metrics(1), metrics(3)]
    assert [list(row) for row in rows] == [KEYS, KEYS]


def test_a_run_that_goes_on_keeps_the_rows_before_it_and_drops_those_it_takes_again(
    run_log: RunLog, tmp_path: Path
):
    file = tmp_path / "metrics.jsonl"
    with run_log.training(4):
        for step in (1, 2, 3):
            run_log.advance(metrics(step))
    with file.open("a") as cut_short:
        cut_short.write('{"step": 2, "lo')
    with run_log.training(4, start_step=2):
        run_log.advance(metrics(3, loss=0.5))
    run_log.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [metrics(1), metrics(2), metrics(3, loss=0.5)]


def test_a_profile_is_a_row_of_its_own_numbers_for_the_tracker_and_lines_for_people(
    run_log: RunLog, recorder: Recorder, tmp_path: Path
):
    report = {"steps": 2, "parts": {"forward_pass": {"seconds": 0.5, "calls": 2}}}
    with run_log.training(3):
        run_log.advance(metrics(1))
        run_log.profile(2, report, ["--- Performance Summary at Step 2 ---", "forward_pass: 0.5000s"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [metrics(1), {"step": 2, "profile": report}]
    path = "profile/parts/forward_pass"
    assert recorder.rows[-1] == (2, {"profile/steps": 2, f"{path}/seconds": 0.5, f"{path}/calls": 2})
    assert (tmp_path / "train.log").read_text().splitlines()[-2:] == [
        "--- Performance Summary at Step 2 ---",
        "forward_pass: 0.5000s",
    ]
    with run_log.training(3, start_step=1):  # a run that goes on before the profiled steps takes them again
        pass
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == metrics(1)


def test_what_is_no_number_is_null_because_json_has_no_other_word(run_log: RunLog, tmp_path: Path):
    """As in fp16's first steps, while the loss scale falls, or where an agent was skipped."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    with run_log.training(2):
        for norm in (math.inf, math.nan):
            run_log.advance(metrics(1, grad_norm=norm, task_loss_per_agent=[norm, 2.5]))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse) == metrics(
            1, grad_norm=None, task_loss_per_agent=[None, 2.5]
        )


def test_the_log_holds_every_logged_step_and_what_the_package_says(run_log: RunLog, tmp_path: Path):
    logging.getLogger("chorus.train").info("DeepSpeed %s is active", "ZeRO-2")
    with run_log.training(2):
        logging.getLogger("chorus.data.batches").warning("cut 3 rows")
        logging.getLogger("someone.else").warning("not ours")
        run_log.advance(metrics(1))
        run_log.advance(metrics(2, swd=None, peak_memory_gib=1.25))
    run_log.close()
    active, cut, first, second, memory = (tmp_path / "train.log").read_text().splitlines()
    assert active.endswith("INFO chorus.train: DeepSpeed ZeRO-2 is active")
    assert cut.endswith("WARNING chorus.data.batches: cut 3 rows")
    assert "step 1  loss 1.9000  agents 1.5000 2.5000  swd 10.0000  lr 1.00e-03" in first
    assert "step 2 " in second
    assert "swd" not in second
    assert re.search(r"\[Step 2\] CPU Memory - Resident: \d+\.\d\dGB, Max Resident: \d+\.\d\dGB$", memory)


def test_the_terminal_gets_each_log_line_whole_and_as_it_is(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shown = io.StringIO()
    monkeypatch.setattr(run_log_module, "Console", lambda **_: Console(file=shown, width=70))
    run_log = WritingRunLog(accelerator, tmp_path, Trackers([], tmp_path, {}))
    text = "agent 0 [bold]is not markup[/bold] and this line is longer than the terminal is wide"
    logging.getLogger("chorus.train").info(text)
    run_log.table(TABLE)
    run_log.close()
    assert any(line.endswith(f" {text}") for line in shown.getvalue().splitlines())
    assert "agent 1" in shown.getvalue()


def test_an_evaluation_has_a_bar_on_a_terminal_before_and_in_training(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    terminal = io.StringIO()
    shown = Console(file=terminal, force_terminal=True, force_interactive=True, width=100)
    monkeypatch.setattr(run_log_module, "Console", lambda **_: shown)
    run_log = open_run_log(accelerator, tmp_path, {}, [])

    def score() -> None:
        with run_log.scoring(30) as advance:
            advance("calibrated", 10)
            advance("scored", 7)

    score()
    assert re.search(r"scored .*17/30", terminal.getvalue())
    with run_log.training(4, start_step=1):
        terminal.truncate(0)
        score()
    run_log.close()
    assert re.search(r"scored .*17/30", terminal.getvalue())
    assert re.search(r"training .*1/4", terminal.getvalue())


def test_a_tracker_gets_the_settings_and_every_number_of_a_logged_step(run_log: RunLog, recorder: Recorder):
    with run_log.training(2):
        run_log.advance(metrics(1))
        run_log.advance(None)
    assert recorder.config == {
        "lr": 0.1,
        "mode": "x",
    }  # a tracker's table of settings holds plain values only
    [(step, row)] = recorder.rows
    numbers = {key: value for key, value in metrics(1).items() if key != "task_loss_per_agent"}
    assert step == 1
    assert row == {**numbers, "task_loss_agent_0": 1.5, "task_loss_agent_1": 2.5}
    run_log.close()
    assert recorder.is_finished


def test_learning_rates_of_each_agent_are_a_range_in_the_log_and_a_number_an_agent_for_a_tracker(
    run_log: RunLog, recorder: Recorder, tmp_path: Path
):
    with run_log.training(2):
        run_log.advance({**metrics(1), "lr": [3e-4, 1e-4]})
    run_log.close()
    [(_, row)] = recorder.rows
    assert (row["lr_agent_0"], row["lr_agent_1"]) == (3e-4, 1e-4)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["lr"] == [3e-4, 1e-4]
    assert "  lr 1.00e-04 to 3.00e-04  grad norm" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("failed", [True, False])
def test_closing_leaves_no_handler_and_no_open_file_also_after_a_failure(
    accelerator: Accelerator, tmp_path: Path, failed: bool
):
    before = list(CHORUS.handlers)
    run_log = open_run_log(accelerator, tmp_path, {}, [])
    assert isinstance(run_log, WritingRunLog)
    handlers = [handler for handler in CHORUS.handlers if handler not in before]
    assert handlers
    if failed:
        with pytest.raises(RunError), run_log.training(1):
            raise RunError("agent 0: loss is nan")
    run_log.close()
    assert CHORUS.handlers == before
    assert run_log._metrics.closed
    assert not any(handler.stream for handler in handlers if isinstance(handler, logging.FileHandler))
    CHORUS.warning("after the end")
    assert "after the end" not in (tmp_path / "train.log").read_text()


def test_a_log_line_that_the_disk_refuses_is_raised_with_the_next_collective_call_and_not_before(
    accelerator: Accelerator, recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Raised by the line itself it would end the first process alone."""
    (tmp_path / "train.log").symlink_to("/dev/full")
    run_log = open_run_log(accelerator, tmp_path, {}, [recorder])
    with run_log.training(3):
        logging.getLogger("chorus.train").info("2 agents")
        run_log.advance(None)  # no collective call
    for call in (
        lambda: run_log.table(TABLE),
        lambda: run_log.profile(1, {}, ["half a second"]),
        lambda: run_log.training(3),
    ):
        with pytest.raises(RunError, match=r"train\.log could not be written: .*No space left") as error:
            call()
        assert "8 bytes needed" in str(error.value), "the first line is the one to name"
    run_log.close()
    assert not recorder.is_finished, "a tracker's own error at the end would hide this one"
    assert "Traceback" not in capsys.readouterr().err


def test_the_journal_of_another_process_is_silent_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Without a handler anywhere, as in a run, logging itself would write a warning to stderr."""

    class SecondProcess:
        is_main_process = False

    process: Any = SecondProcess()
    monkeypatch.setattr(CHORUS, "handlers", [])
    monkeypatch.setattr(CHORUS, "propagate", False)
    run_log = open_run_log(process, tmp_path, {"lr": 0.1}, ["tensorboard"])
    with run_log.training(2):
        run_log.advance(metrics(1))
    run_log.table(TABLE)
    CHORUS.warning("cut 3 rows")  # the first process says it
    run_log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert all(isinstance(handler, logging.NullHandler) for handler in CHORUS.handlers)
