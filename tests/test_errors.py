import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import wait_for
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from chorus import errors
from chorus.errors import (
    InputError,
    LostProcess,
    RunError,
    first_line,
    input_errors_end_the_program,
    out_of_memory,
)

PROGRAM = """
from chorus.errors import InputError, Preempted, RunError, input_errors_end_the_program
with input_errors_end_the_program():
    try:
        {}
    except ZeroDivisionError as cause:
        raise InputError("configs.yaml: key 'lr' is 0; give more") from cause
"""


def run(statement: str) -> subprocess.CompletedProcess[str]:
    """A real process that ends in `statement`."""
    return subprocess.run([sys.executable, "-c", PROGRAM.format(statement)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("statement", "code", "line"),
    [
        ("raise InputError(\"configs.yaml: key 'lr' is 0\")", 2, "error: configs.yaml: key 'lr' is 0\n"),
        ("1 / 0", 2, "error: configs.yaml: key 'lr' is 0; give more\n"),  # its cause is not shown either
        ("raise RunError('agent 1: loss is nan')", 3, "error: agent 1: loss is nan\n"),
        ("raise Preempted('stopped and saved after step 7')", 4, "stopped and saved after step 7\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        (
            "bytearray(10**16)",
            3,
            "error: out of memory: MemoryError; end what else uses the device, or ask for less\n",
        ),
        ("pass", 0, ""),
    ],
)
def test_an_error_meant_for_people_is_one_line_on_stderr_and_an_exit_code(
    statement: str, code: int, line: str
):
    ended = run(statement)
    assert (ended.returncode, ended.stderr, ended.stdout) == (code, line, "")


@pytest.mark.parametrize("error", ["InputError", "LostProcess", "Preempted"])
def test_the_line_is_one_write_so_that_no_other_process_comes_between_it_and_its_end(error: str):
    """Without buffers, as torchrun starts Python; through a pipe that keeps writes apart."""
    reading, writing = os.pipe2(os.O_DIRECT)
    code = PROGRAM.replace("Preempted,", "LostProcess, Preempted,").format(f"raise {error}('line')")
    with os.fdopen(writing) as stderr:
        subprocess.run([sys.executable, "-u", "-c", code], stderr=stderr, check=False)
    assert os.read(reading, 100) == (b"line\n" if error == "Preempted" else b"error: line\n")
    os.close(reading)


def test_torchrun_reads_our_line_as_the_cause_and_that_of_a_process_that_lost_another_as_a_later_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By torch's reader of what a process leaves: the earliest failure is the root cause in its report."""
    monkeypatch.setattr(errors.os, "_exit", sys.exit)
    monkeypatch.setattr(errors.time, "time", lambda: 100.5)
    failures = []
    for error in (LostProcess("another has ended"), InputError("key 'lr' is 0"), RunError("agent 1 is nan")):
        file = str(tmp_path / type(error).__name__)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", file)
        with pytest.raises(SystemExit), input_errors_end_the_program():
            raise error
        read = ProcessFailure(local_rank=0, pid=1, exitcode=3, error_file=file)
        failures.append((read.message["message"], read.timestamp))
    assert failures == [
        ("error: another has ended", 101),
        ("error: key 'lr' is 0", 100),
        ("error: agent 1 is nan", 100),
    ]


def test_a_signal_amid_a_write_to_stderr_has_its_line_all_the_same():
    code = """
import os, signal, sys
from chorus.errors import end_on_signals
end_on_signals()
class AmidAWrite:
    def write(self, text):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")
    def isatty(self): return False
    def flush(self): pass
sys.stderr = AmidAWrite()
sys.stderr.write("a line of the log")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 4
    assert ended.stderr.startswith("stopped by SIGTERM: ")


@pytest.mark.parametrize(
    "statement", ["raise ValueError('ours')", "raise RuntimeError('ours')", "assert False, 'ours'"], ids=str
)
def test_a_mistake_of_ours_keeps_its_traceback(statement: str):
    ended = run(statement)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last)")
    assert ended.stderr.rstrip().endswith("Error: ours")


@pytest.mark.parametrize("error", [SystemExit(7), OSError("ours")])
def test_every_other_exception_passes_unchanged(error: BaseException):
    with pytest.raises(type(error)) as raised, input_errors_end_the_program():
        raise error
    assert raised.value is error


def test_the_two_kinds_are_kinds_of_the_built_in_ones():
    """Callers of the package catch ValueError and RuntimeError without knowing of Chorus."""
    assert issubclass(InputError, ValueError)
    assert issubclass(RunError, RuntimeError)


def raised_by(act: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        act()
    return raised.value


def led_to(cause: BaseException) -> BaseException:
    """As a capture ends, or a compiler: by an error of its own, on top of the cause."""
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = ValueError("in between")
    error.__context__.__cause__ = cause
    return error


CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.19 "
    "GiB is free. Process 1 has 77.92 GiB memory in use."
)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), "2.00 GiB asked for, 1.19 GiB free"),
        (led_to(torch.OutOfMemoryError(CUDA)), "2.00 GiB asked for, 1.19 GiB free"),
        (raised_by(lambda: torch.empty(2**60)), "4294967296.00 GiB asked for"),
        (raised_by(lambda: np.empty(2**53)), "64.0 PiB asked for"),
        (raised_by(lambda: bytearray(2**60)), "MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "[Errno 12] Cannot allocate memory"),
        (
            RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (RuntimeError("CUDA error: out of memory\nmore"), "CUDA error: out of memory"),
    ],
    ids=str,
)
def test_a_lack_of_memory_is_known_whoever_has_it_and_says_what_was_asked_for(
    error: BaseException, asked: str
):
    assert (out_of_memory(error) or "").startswith(asked)


@pytest.mark.parametrize(
    "error", [RuntimeError("ours"), OSError(28, "No space left"), led_to(ValueError("ours"))]
)
def test_no_other_error_is_a_lack_of_memory(error: BaseException):
    assert out_of_memory(error) is None


@pytest.mark.parametrize(
    ("text", "line"), [("one\ntwo", "one"), ("\n  one \ntwo", "one"), ("", "ValueError")]
)
def test_an_error_is_told_by_its_first_line_that_says_something(text: str, line: str):
    assert first_line(ValueError(text)) == line


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's end")
def test_a_script_that_is_called_like_the_launcher_may_end_before_its_run(tmp_path: Path):
    script, done, go_on = tmp_path / "accelerate launch.sh", tmp_path / "done", tmp_path / "go_on"
    program = (
        "import pathlib, time; from chorus.errors import end_on_signals; end_on_signals();"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch();"
        f"\nwhile not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.01)"
        f"\npathlib.Path({str(done)!r}).touch()"
    )
    script.write_text(
        f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} &\n"
        f"while ! [ -e {shlex.quote(str(tmp_path / 'ready'))} ]; do sleep 0.01; done\n"
    )
    subprocess.run(["sh", str(script)], check=True)
    go_on.touch()
    wait_for(done.exists, 60)
