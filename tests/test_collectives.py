"""Signals and outcomes in one process, and what becomes of a run one process of which is lost;
test_resumed_runs.py sends signals to launched ones."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from launching import PATIENCE_S, ROOT, ddp, environment, launch, train, wait_for, zero2
from preloaded import Workers, environments_once, preload

from chorus import collectives
from chorus.checkpoint.store import checkpoints, step_of, verify
from chorus.collectives import lost_processes_named, on_every_process, on_first_process, refuse_differences
from chorus.errors import InputError, LostProcess, RunError
from chorus.training.signals import StopRequest


class FirstOfOne:
    num_processes, is_main_process = 1, True


def test_a_signal_is_remembered_and_ends_nothing():
    one: Any = FirstOfOne()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with StopRequest(one, timeout_s=60) as stop:
            assert not stop.is_agreed()
            os.kill(os.getpid(), number)
            assert stop.is_agreed()
            os.kill(os.getpid(), number)  # as when a launcher passes Ctrl-C on to whom it has reached already
            assert stop.is_agreed()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("is_after_a_step", [False, True])
def test_a_signal_in_the_first_step_or_after_the_last_one_ends_the_run(is_after_a_step: bool):
    """In the first one there is nothing to save yet, and after the last one all is saved."""
    code = """
import os, signal
from chorus.errors import end_on_signals
from chorus.training.signals import StopRequest
class One: num_processes = 1
end_on_signals()
with StopRequest(One(), timeout_s=60) as stop:
    {}
    os.kill(os.getpid(), signal.SIGTERM)
    print("ends the step")
print("goes on")
"""
    code = code.format("stop.is_agreed()" if is_after_a_step else "pass  # compiles")
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (4, "ends the step\n" if is_after_a_step else ""), ended.stderr
    assert ended.stderr == "stopped by SIGTERM: no step is lost; resume_from_checkpoint=auto resumes it\n"


TWO_SIGNALS = """
import hashlib, os, threading, time
from chorus.training import signals
class One: num_processes = 1

def work(rounds):
    # A call that takes seconds and lets no handler run.
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)

def ask():
    os.kill(os.getpid(), {})

with signals.StopRequest(One(), timeout_s=600) as stop:
    stop.is_agreed()
    ask()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_whatever_the_process_waits_for(number: signal.Signals):
    code = (
        TWO_SIGNALS.format(int(number))
        + """
    signals.ONE_REQUEST_S = 0.2
    def ask_again():
        while True:
            time.sleep(0.3)
            ask()
    threading.Thread(target=ask_again, daemon=True).start()
    work(20_000_000)
    print("goes on")
"""
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (130, ""), ended.stderr
    assert ended.stderr == (
        f"ended at once by a second {number.name}: resume_from_checkpoint=auto resumes from the "
        "last checkpoint, if there is one\n"
    )


def test_two_signals_of_one_request_are_one_although_the_second_is_handled_much_later():
    code = (
        TWO_SIGNALS.format(int(signal.SIGINT))
        + """
    signals.ONE_REQUEST_S = 1.0
    threading.Timer(0.1, ask).start()
    work(4_000_000)
    print("saved", stop.is_agreed(), flush=True)
"""
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "saved True\n"), ended.stderr


@pytest.mark.parametrize("error", [InputError("bad key"), RunError("disk full")])
def test_an_error_of_the_first_process_is_every_process_s(error: Exception, monkeypatch: pytest.MonkeyPatch):
    """Two processes in turn, with the broadcast between them."""
    sent: list = []

    class Process:
        def __init__(self, is_main_process: bool):
            self.is_main_process = is_main_process

    def broadcast(outcome: list) -> None:
        if not sent:
            sent.extend(outcome)
        outcome[:] = sent

    def act() -> None:
        raise error

    monkeypatch.setattr(collectives, "broadcast_object_list", broadcast)
    for is_main_process in (True, False):
        process: Any = Process(is_main_process)
        with pytest.raises(type(error), match=str(error)):
            on_first_process(process, act)


def test_the_result_of_the_act_is_returned():
    assert on_first_process(Accelerator(cpu=True), lambda: 3) == 3


@pytest.mark.parametrize("own", [None, InputError("no such folder")])
def test_an_error_of_any_process_is_every_processs_and_names_its_host(
    own: Exception | None, monkeypatch: pytest.MonkeyPatch
):
    """This process, and another whose outcome arrives by the gathering."""
    other = InputError("disk full")
    monkeypatch.setattr(
        collectives, "gather_object", lambda outcomes: [*outcomes, (other, "far"), (None, "farther")]
    )

    def act() -> None:
        if own is not None:
            raise own

    with pytest.raises(InputError) as error:
        on_every_process(act)
    expected = "disk full (on host far)" if own is None else f"{own} (on host {socket.gethostname()})"
    assert str(error.value) == expected


def test_an_error_that_all_processes_have_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collectives, "gather_object", lambda outcomes: outcomes * 2)
    with pytest.raises(RunError, match=r"^disk full$"):
        on_every_process(lambda: (_ for _ in ()).throw(RunError("disk full")))


def test_what_differs_from_the_first_process_is_refused_with_both_values(monkeypatch: pytest.MonkeyPatch):
    def broadcast(values: list) -> None:
        values[0] = {"key 'lr'": 0.1, "the version of torch": "2.13"}

    monkeypatch.setattr(collectives, "broadcast_object_list", broadcast)
    refuse_differences({"key 'lr'": 0.1, "the version of torch": "2.13"})
    with pytest.raises(InputError, match=r"the version of torch is 2.11, but 2.13 on the first process"):
        refuse_differences({"key 'lr'": 0.1, "the version of torch": "2.11"})


# ---- another process is gone ----


def test_an_error_that_is_not_about_another_process_is_left_as_it_is():
    for error in (
        RuntimeError("CUDA out of memory"),
        RunError("agent 0: full disk"),
        ValueError("gloo timed out"),
    ):
        with pytest.raises(type(error)) as caught, lost_processes_named(3):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2946"),
            "has ended",
        ),
        (
            RuntimeError("[/gloo/buf.cc:81] Timed out waiting 3000ms for recv operation"),
            "did not answer within 3 s",
        ),
        (torch.distributed.DistStoreError("wait timeout after 3000ms"), "did not answer within 3 s"),
        (torch.distributed.DistNetworkError("Failed to recv, got 0 bytes"), "has ended"),
    ],
)
def test_a_lost_process_is_named_in_one_line_with_the_key(error: Exception, expected: str):
    def fail() -> None:
        raise error

    with pytest.raises(LostProcess) as caught, lost_processes_named(3):
        on_first_process(Accelerator(cpu=True), fail)
    line = str(caught.value)
    assert line.startswith("process 0: another process ")
    assert expected in line
    assert "in on_first_process (collectives.py:" in line
    assert "\n" not in line


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


@pytest.mark.launch
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


@pytest.mark.launch
@pytest.mark.parametrize(
    ("engine", "where", "act"),
    [*SAMPLE, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_a_run_that_loses_a_process_ends_and_goes_on_from_its_last_checkpoint(
    engine: str, where: str, act: str, tmp_path: Path, request: pytest.FixtureRequest
):
    timeout_s = 30 if act == "stop" else 600
    is_whole = request.node.get_closest_marker("slow") is not None
    # The launcher itself ends what the loss has left.
    is_launched = is_whole or act == "kill"
    codes, said, seconds = lose(COMMANDS[engine], where, act, tmp_path, timeout_s, is_launched)
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


@pytest.mark.launch
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
