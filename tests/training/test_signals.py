"""Signals in one process; test_resumed_runs.py sends them to launched runs."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from preloaded import forked

from chorus.training.signals import StopRequest


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The code as the main program of a forked process."""
    script = folder / "script.py"
    script.write_text(code)
    return forked([sys.executable, str(script)])


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
def test_a_signal_in_the_first_step_or_after_the_last_one_ends_the_run(is_after_a_step: bool, tmp_path: Path):
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
    ended = run(code, tmp_path)
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
def test_a_second_signal_ends_at_once_whatever_the_process_waits_for(number: signal.Signals, tmp_path: Path):
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
    ended = run(code, tmp_path)
    assert (ended.returncode, ended.stdout) == (130, ""), ended.stderr
    assert ended.stderr == (
        f"ended at once by a second {number.name}: resume_from_checkpoint=auto resumes from the "
        "last checkpoint, if there is one\n"
    )


def test_two_signals_of_one_request_are_one_although_the_second_is_handled_much_later(tmp_path: Path):
    code = (
        TWO_SIGNALS.format(int(signal.SIGINT))
        + """
    signals.ONE_REQUEST_S = 1.0
    threading.Timer(0.1, ask).start()
    work(4_000_000)
    print("saved", stop.is_agreed(), flush=True)
"""
    )
    ended = run(code, tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "saved True\n"), ended.stderr
