"""What becomes of a run one process of which is lost, in real processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import PATIENCE_S, ROOT, ddp, environment, launch, train, wait_for, zero2
from preloaded import Workers, environments_once, preload

from chorus.checkpoint.store import checkpoints, step_of, verify

pytestmark = pytest.mark.launch
LOST = ("num_agents=2", "eval_samples=0", "logging_steps=1", "debug_subset_size=100", "max_train_steps=6")
LOST = (*LOST, "save_steps=2", "save_total_limit=null", "lambda_sw=0.1", "batch_size=2")


def lose(
    command: list[str], where: str, act: str, folder: Path, timeout_s: int, is_launched: bool = False
) -> tuple[list[int | None], str, float]:
    """A run that loses a process.

    Args:
        is_launched: by the real launcher. Otherwise the processes are forked.

    Returns:
        The exit codes (of all processes, or of the launcher), what the run said, and the seconds from the
        loss to the end.
    """
    settings = (*LOST, f"output_dir={folder}/run", f"collective_timeout_s={timeout_s}")
    if not is_launched:
        return lose_a_fork(command, (where, act, *settings), act, folder)
    with (folder / "log").open("w") as log:
        launcher = subprocess.Popen(
            [*command[:-1], "tests/helpers/fault_worker.py", where, act, *settings],
            cwd=ROOT,
            env=environment(CHORUS_TEST_FAULT=str(folder / "lost")),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = launcher.wait(timeout=PATIENCE_S)
        finally:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    return [code], (folder / "log").read_text(), time.time() - (folder / "lost").stat().st_mtime


def lose_a_fork(
    command: list[str], arguments: tuple[str, ...], act: str, folder: Path
) -> tuple[list[int | None], str, float]:
    preload()
    environments = [{**own, "CHORUS_TEST_FAULT": str(folder / "lost")} for own in environments_once(command)]
    log = folder / "log"
    workers = Workers(environments, arguments, log, script="tests/helpers/fault_worker.py")
    try:
        if act == "stop soon":
            wait_for(lambda: log.exists() and "error: " in log.read_text())
            os.kill(int((folder / "lost").read_text()), signal.SIGKILL)
        workers.wait()
    finally:
        workers.kill()
    return workers.exit_codes, log.read_text(), time.time() - (folder / "lost").stat().st_mtime


@pytest.mark.parametrize(
    ("processes", "act"), [(1, "ask"), pytest.param(2, "ask", marks=pytest.mark.slow), (2, "kill")]
)
def test_no_signal_takes_the_last_line_or_the_exit_code_of_a_run_that_is_stopped_or_loses_a_process(
    processes: int, act: str, tmp_path: Path
):
    """As from a launcher that is asked twice, or has seen another process end."""
    command = [sys.executable, "train.py"] if processes == 1 else ddp(2)
    ended = launch(
        [*command[:-1], "tests/helpers/fault_worker.py", "last words", act], f"output_dir={tmp_path}", *LOST
    )
    lines = [
        line
        for line in ended.stderr.splitlines()
        if re.match("stopped and saved after step 5;|error: ", line)
    ]
    codes = re.findall(r"exitcode +: (-?\d+) ", ended.stderr) if processes > 1 else [str(ended.returncode)]
    if act == "ask":
        assert (len(lines), codes) == (processes, ["4"] * processes), ended.stderr[-3000:]
    else:
        assert [line[:42] for line in lines] == ["error: process 0: another process has ende"], ended.stderr[
            -3000:
        ]
        assert sorted(codes) == ["-9", "3"], ended.stderr[-3000:]
    assert step_of(checkpoints(tmp_path)[0]) == (5 if act == "ask" else 4)


COMMANDS = {"ddp": ddp(2), "zero2": zero2(2)}
SAMPLE = [("ddp", "save", "kill"), ("zero2", "forward", "exit"), ("ddp", "backward", "stop soon")]
REST = [  # the whole of it, and that the run goes on, and that the launcher has ended within a minute
    *(
        (engine, where, act)
        for engine in COMMANDS
        for where in ("forward", "backward", "save")
        for act in ("kill", "exit")
    ),
    *((engine, where, "stop") for engine in COMMANDS for where in ("forward", "save")),
]


@pytest.mark.parametrize(
    ("engine", "where", "act"),
    [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_a_run_that_loses_a_process_ends_and_goes_on_from_its_last_checkpoint(
    engine: str, where: str, act: str, tmp_path: Path, request: pytest.FixtureRequest
):
    timeout_s = 30 if act == "stop" else 600
    is_whole = request.node.get_closest_marker("slow") is not None
    codes, said, seconds = lose(COMMANDS[engine], where, act, tmp_path, timeout_s, is_launched=is_whole)
    assert any(codes), said[-3000:]
    survivor = 1 if where == "save" else 0
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    expected = f"did not answer within {timeout_s} s" if "stop" in act else "has ended"
    assert line.startswith(f"error: process {survivor}: another process {expected}"), line
    announced = [2] if where == "save" else [4, 2]
    assert [verify(folder).step for folder in checkpoints(tmp_path / "run")] == announced
    if is_whole:
        rows = train(COMMANDS[engine], tmp_path / "run", *LOST)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert seconds < 60 + (timeout_s if act == "stop" else 0)


@pytest.mark.parametrize(("where", "victim"), [("backward", 1), ("save", 0)])
def test_a_process_that_runs_out_of_memory_says_so_and_all_end_with_the_last_checkpoint_whole(
    where: str, victim: int, tmp_path: Path
):
    codes, said, _ = lose(ddp(2), where, "memory", tmp_path, timeout_s=600)
    assert codes == [3, 3], said[-3000:]
    lines = sorted(line for line in said.splitlines() if line.startswith("error: "))
    assert len(lines) == 2, said[-3000:]
    own, other = sorted(lines, key=lambda line: "another process has ended" in line)
    assert own.startswith(f"error: process {victim}: out of memory in training, at "), lines
    assert (
        "4294967296.00 GiB asked for; set gradient_checkpointing=full, or parallel_mode=sequential, or" in own
    )
    assert other.startswith(f"error: process {1 - victim}: another process has ended")
    announced = [2] if where == "save" else [4, 2]
    assert [verify(folder).step for folder in checkpoints(tmp_path / "run")] == announced
