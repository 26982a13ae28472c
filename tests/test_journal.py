import io
import json
import logging
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from rich.console import Console
from torch import Tensor

from chorus import journal as journal_module
from chorus.errors import RunError
from chorus.evaluate import Evaluation, Score
from chorus.journal import (
    Journal,
    Meter,
    WritingJournal,
    evaluation_table,
    open_journal,
)
from chorus.objective import Objective

KEYS = [
    *("step", "loss", "task_loss", "swd", "task_loss_per_agent", "lr", "grad_norm", "skipped"),
    "agent_tokens_per_second",
]
CHORUS = logging.getLogger("chorus")


def metrics(step: int, **more: Any) -> dict[str, Any]:
    """A row as the meter makes it."""
    values = [step, 1.9, 2.0, 10.0, [1.5, 2.5], 1e-3, 0.5, 0, 1000.0]
    return {**dict(zip(KEYS, values, strict=True)), **more}


class Recorder(GeneralTracker):
    """A tracker of the user's own, as Accelerate takes them."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = dict(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.append((step, values))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def accelerator(recorder: Recorder) -> Iterator[Accelerator]:
    yield Accelerator(cpu=True, log_with=[recorder])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def journal(accelerator: Accelerator, tmp_path: Path) -> Iterator[Journal]:
    journal = open_journal(accelerator, tmp_path, {"lr": 0.1, "dataset_subset": None, "modules": ["a"], "mode": "x"})
    yield journal
    journal.close()


# ---- the meter ----


class EngineOf:
    """The engine of one of several processes: `sum` adds what the others bring."""

    grad_norm: float | Tensor = torch.tensor(0.25)

    def __init__(self, *others: list[float]) -> None:
        self.others = others

    def sum(self, own: Tensor) -> Tensor:
        return own + sum(torch.tensor(other, dtype=own.dtype) for other in self.others)


def part(nll: list[float], swd: float | None) -> Objective:
    return Objective(torch.zeros(()), torch.tensor(nll), None if swd is None else torch.tensor(swd))


def read(meter: Meter, engine: Any = None, lambda_sw: float = 0.1, step: int = 7) -> dict[str, Any]:
    return meter.read(engine or EngineOf(), lambda_sw, step, 3e-4, skipped=2)


def test_the_means_are_those_of_steps_micro_batches_and_agents():
    meter = Meter(2, torch.device("cpu"))
    # step 1: two micro-batches with 10 targets in all; step 2: two with 4
    meter.add(part([6.0, 8.0], 1.0), num_targets=10, num_micro_batches=2, tokens=12)
    meter.add(part([9.0, 2.0], 3.0), num_targets=10, num_micro_batches=2, tokens=20)
    meter.end_step()
    meter.add(part([1.0, 3.0], 5.0), num_targets=4, num_micro_batches=2, tokens=12)
    meter.add(part([2.0, 4.0], 9.0), num_targets=4, num_micro_batches=2, tokens=16)
    meter.end_step()
    row = read(meter)
    per_agent = [(15 / 10 + 3 / 4) / 2, (10 / 10 + 7 / 4) / 2]
    swd = ((1 + 3) / 2 + (5 + 9) / 2) / 2
    assert list(row) == KEYS
    assert row["task_loss_per_agent"] == pytest.approx(per_agent)
    assert row["task_loss"] == pytest.approx(sum(per_agent) / 2)
    assert row["swd"] == pytest.approx(swd)
    assert row["loss"] == pytest.approx(sum(per_agent) / 2 - 0.1 * swd)
    assert (row["step"], row["lr"], row["grad_norm"], row["skipped"]) == (7, 3e-4, 0.25, 2)


def test_losses_and_tokens_are_summed_over_processes_and_the_distance_is_not():
    """Every process reports its own rows' losses over the step's targets, and the one distance between all rows."""
    meter = Meter(2, torch.device("cpu"))
    meter.add(part([6.0, 8.0], 1.5), num_targets=20, num_micro_batches=1, tokens=12)
    meter.end_step()
    row = read(meter, EngineOf([0.5, 0.25, 30.0], [0.125, 0.0, 0.0]))
    assert row["task_loss_per_agent"] == pytest.approx([6 / 20 + 0.625, 8 / 20 + 0.25])
    assert row["swd"] == pytest.approx(1.5)


def test_the_throughput_counts_every_agents_tokens_on_every_process(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = Meter(3, torch.device("cpu"))
    for _ in range(2):
        meter.add(part([1.0, 1.0, 1.0], None), num_targets=5, num_micro_batches=1, tokens=50)
        meter.end_step()
    assert read(meter, EngineOf([0.0, 0.0, 0.0, 60.0]))["agent_tokens_per_second"] == pytest.approx(3 * 160 / 4)


def test_without_a_distance_the_loss_is_the_task_loss():
    meter = Meter(2, torch.device("cpu"))
    meter.add(part([2.0, 4.0], None), num_targets=2, num_micro_batches=1, tokens=4)
    meter.end_step()
    row = read(meter, lambda_sw=0.0)
    assert row["swd"] is None
    assert row["loss"] == row["task_loss"] == pytest.approx(1.5)


def test_a_reading_starts_anew():
    meter = Meter(1, torch.device("cpu"))
    for nll, swd in ((4.0, 2.0), (1.0, None)):
        meter.add(part([nll], swd), num_targets=2, num_micro_batches=1, tokens=4)
        meter.end_step()
        row = read(meter)
        assert (row["task_loss"], row["swd"]) == (nll / 2, swd)


def test_a_loss_that_is_no_number_leaves_the_other_agents_theirs_and_is_gone_from_the_next_reading():
    meter = Meter(3, torch.device("cpu"))
    meter.add(part([1.0, math.inf, 1.0], None), num_targets=2, num_micro_batches=1, tokens=4)
    meter.end_step()
    losses = read(meter, EngineOf([math.nan, 0.0, 0.5, 0.0]))["task_loss_per_agent"]
    assert [math.isfinite(loss) for loss in losses] == [False, False, True]
    assert losses[2] == 1.0
    meter.add(part([1.0, 2.0, 3.0], None), num_targets=1, num_micro_batches=1, tokens=4)
    meter.end_step()
    assert read(meter)["task_loss_per_agent"] == [1.0, 2.0, 3.0]


# ---- the journal ----


def test_every_logged_step_is_one_json_object_a_line(journal: Journal, tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    with journal.training(3):
        for step in (1, 2, 3):
            journal.advance(metrics(step) if step != 2 else None)
            assert len(file.read_text().splitlines()) == (1 if step < 3 else 2), "written at once: a crash loses none"
    journal.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [metrics(1), metrics(3)]
    assert [list(row) for row in rows] == [KEYS, KEYS]


def test_a_run_that_goes_on_keeps_the_rows_before_it_and_drops_those_it_takes_again(journal: Journal, tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    with journal.training(4):
        for step in (1, 2, 3):
            journal.advance(metrics(step))
    with file.open("a") as cut_short:
        cut_short.write('{"step": 2, "lo')
    with journal.training(4, start_step=2):
        journal.advance(metrics(3, loss=0.5))
    journal.close()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [metrics(1), metrics(2), metrics(3, loss=0.5)]


def test_a_profile_is_a_row_of_its_own_numbers_for_the_tracker_and_lines_for_people(
    journal: Journal, recorder: Recorder, tmp_path: Path
):
    report = {"steps": 2, "parts": {"forward_pass": {"seconds": 0.5, "calls": 2}}}
    with journal.training(3):
        journal.advance(metrics(1))
        journal.profile(2, report, ["--- Performance Summary at Step 2 ---", "forward_pass: 0.5000s"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [metrics(1), {"step": 2, "profile": report}]
    path = "profile/parts/forward_pass"
    assert recorder.rows[-1] == (2, {"profile/steps": 2, f"{path}/seconds": 0.5, f"{path}/calls": 2})
    assert (tmp_path / "train.log").read_text().splitlines()[-2:] == [
        "--- Performance Summary at Step 2 ---",
        "forward_pass: 0.5000s",
    ]
    with journal.training(3, start_step=1):  # a run that goes on before the profiled steps takes them again
        pass
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == metrics(1)


def test_what_is_no_number_is_null_because_json_has_no_other_word(journal: Journal, tmp_path: Path):
    """As in fp16's first steps, while the loss scale falls, or where an agent was skipped."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    with journal.training(2):
        for norm in (math.inf, math.nan):
            journal.advance(metrics(1, grad_norm=norm, task_loss_per_agent=[norm, 2.5]))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse) == metrics(1, grad_norm=None, task_loss_per_agent=[None, 2.5])


def test_the_log_holds_every_logged_step_and_what_the_package_says(journal: Journal, tmp_path: Path):
    logging.getLogger("chorus.train").info("DeepSpeed %s is active", "ZeRO-2")
    with journal.training(2):
        logging.getLogger("chorus.data").warning("cut 3 rows")
        logging.getLogger("someone.else").warning("not ours")
        journal.advance(metrics(1))
        journal.advance(metrics(2, swd=None, peak_memory_gib=1.25))
    journal.close()
    active, cut, first, second, memory = (tmp_path / "train.log").read_text().splitlines()
    assert active.endswith("INFO chorus.train: DeepSpeed ZeRO-2 is active")
    assert cut.endswith("WARNING chorus.data: cut 3 rows")
    assert "step 1  loss 1.9000  agents 1.5000 2.5000  swd 10.0000  lr 1.00e-03" in first
    assert "step 2 " in second
    assert "swd" not in second
    assert re.search(r"\[Step 2\] CPU Memory - Resident: \d+\.\d\dGB, Max Resident: \d+\.\d\dGB$", memory)


def test_the_terminal_gets_each_log_line_whole_and_as_it_is(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shown = io.StringIO()
    monkeypatch.setattr(journal_module, "Console", lambda **_: Console(file=shown, width=70))
    journal = WritingJournal(accelerator, tmp_path, {})
    text = "agent 0 [bold]is not markup[/bold] and this line is longer than the terminal is wide"
    logging.getLogger("chorus.train").info(text)
    journal.table(evaluation_table(EVALUATION, EVALUATION))
    journal.close()
    assert any(line.endswith(f" {text}") for line in shown.getvalue().splitlines())
    assert "agent 1" in shown.getvalue()


def test_a_tracker_gets_the_settings_and_every_number_of_a_logged_step(journal: Journal, recorder: Recorder):
    with journal.training(2):
        journal.advance(metrics(1))
        journal.advance(None)
    assert recorder.config == {"lr": 0.1, "mode": "x"}  # a tracker's table of settings holds plain values only
    [(step, row)] = recorder.rows
    numbers = {key: value for key, value in metrics(1).items() if key != "task_loss_per_agent"}
    assert step == 1
    assert row == {**numbers, "task_loss_agent_0": 1.5, "task_loss_agent_1": 2.5}


@pytest.mark.parametrize("failed", [True, False])
def test_closing_leaves_no_handler_and_no_open_file_also_after_a_failure(
    accelerator: Accelerator, tmp_path: Path, failed: bool
):
    before = list(CHORUS.handlers)
    journal = open_journal(accelerator, tmp_path, {})
    assert isinstance(journal, WritingJournal)
    handlers = [handler for handler in CHORUS.handlers if handler not in before]
    assert handlers
    if failed:
        with pytest.raises(RunError), journal.training(1):
            raise RunError("agent 0: loss is nan")
    journal.close()
    assert CHORUS.handlers == before
    assert journal._metrics.closed
    assert not any(handler.stream for handler in handlers if isinstance(handler, logging.FileHandler))
    CHORUS.warning("after the end")
    assert "after the end" not in (tmp_path / "train.log").read_text()


def test_a_log_line_that_the_disk_refuses_is_raised_with_the_next_collective_call_and_not_before(
    accelerator: Accelerator, recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Raised by the line itself it would end the first process alone."""
    (tmp_path / "train.log").symlink_to("/dev/full")
    journal = open_journal(accelerator, tmp_path, {})
    with journal.training(3):
        logging.getLogger("chorus.train").info("2 agents")
        journal.advance(None)  # no collective call
    for call in (
        lambda: journal.table(evaluation_table(EVALUATION, EVALUATION)),
        lambda: journal.profile(1, {}, ["half a second"]),
        lambda: journal.training(3),
    ):
        with pytest.raises(RunError, match=r"train\.log could not be written: .*No space left") as error:
            call()
        assert "8 bytes needed" in str(error.value), "the first line is the one to name"
    assert not accelerator.trackers, "their own error at the end would hide this one"
    journal.close()
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
    journal = open_journal(process, tmp_path, {"lr": 0.1})
    with journal.training(2):
        journal.advance(metrics(1))
    journal.table(evaluation_table(EVALUATION, EVALUATION))
    CHORUS.warning("cut 3 rows")  # the first process says it
    journal.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert all(isinstance(handler, logging.NullHandler) for handler in CHORUS.handlers)


@pytest.mark.parametrize("with_memory", [True, False])
def test_the_peak_memory_is_read_where_it_is_asked_for(with_memory: bool):
    meter = Meter(1, torch.device("cpu"), with_memory)
    meter.add(part([1.0], None), num_targets=1, num_micro_batches=1, tokens=1)
    meter.end_step()
    row = read(meter)
    assert list(row) == [*KEYS, *(["peak_memory_gib"] if with_memory else [])]


# ---- the table ----

EVALUATION = Evaluation(
    Score(0.0, 3.0), [Score(0.25, 2.0), Score(0.5, 1.5)], Score(0.75, 1.25), [0.25, 0.75], num_problems=40
)


def test_the_table_names_every_answerer_with_its_scores_before_and_after():
    even = EVALUATION._replace(weights=[0.5, 0.5], base=Score(0.125, 4.0))
    table = evaluation_table(even, EVALUATION)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("base", "12.5%", "0.0%", "4.0000", "3.0000"),
        ("agent 0", "25.0%", "25.0%", "2.0000", "2.0000"),
        ("agent 1", "50.0%", "50.0%", "1.5000", "1.5000"),
        ("mixture 0.25 0.75", "75.0%", "75.0%", "1.2500", "1.2500"),
    ]
    assert "40" in str(table.title)


def test_without_problems_the_table_says_so():
    nothing = EVALUATION._replace(num_problems=0)
    table = evaluation_table(nothing, nothing)
    assert "nothing scored" in str(table.columns[0].header)
    assert table.row_count == 0
