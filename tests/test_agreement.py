"""Signals and outcomes in one process; test_resume.py sends signals to launched runs."""

import os
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest
from accelerate import Accelerator

from chorus import agreement
from chorus.agreement import StopRequest, on_every_process, on_first_process, refuse_differences
from chorus.errors import InputError, RunError


class FirstOfOne:
    num_processes, is_main_process = 1, True


def test_a_signal_is_remembered_and_ends_nothing():
    one: Any = FirstOfOne()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with StopRequest(one) as stop:
            assert not stop.is_agreed()
            os.kill(os.getpid(), number)
            assert stop.is_agreed()
            os.kill(os.getpid(), number)  # as when a launcher passes Ctrl-C on to whom it has reached already
            assert stop.is_agreed()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number: signal.Signals):
    code = f"""
import os, time
from chorus import agreement
agreement.ONE_REQUEST_S = 0.1
class One: num_processes = 1
with agreement.StopRequest(One()) as stop:
    os.kill(os.getpid(), {int(number)})
    time.sleep(0.3)
    print("lives", flush=True)
    os.kill(os.getpid(), {int(number)})
    time.sleep(0.3)
    print("survives", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout == "lives\n", ended.stderr
    assert ended.returncode == -number


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

    monkeypatch.setattr(agreement, "broadcast_object_list", broadcast)
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
    monkeypatch.setattr(agreement, "gather_object", lambda outcomes: [*outcomes, (other, "far"), (None, "farther")])

    def act() -> None:
        if own is not None:
            raise own

    with pytest.raises(InputError) as error:
        on_every_process(act)
    expected = "disk full (on host far)" if own is None else f"{own} (on host {socket.gethostname()})"
    assert str(error.value) == expected


def test_an_error_that_all_processes_have_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(agreement, "gather_object", lambda outcomes: outcomes * 2)
    with pytest.raises(RunError, match=r"^disk full$"):
        on_every_process(lambda: (_ for _ in ()).throw(RunError("disk full")))


def test_what_differs_from_the_first_process_is_refused_with_both_values(monkeypatch: pytest.MonkeyPatch):
    def broadcast(values: list) -> None:
        values[0] = {"key 'lr'": 0.1, "the version of torch": "2.13"}

    monkeypatch.setattr(agreement, "broadcast_object_list", broadcast)
    refuse_differences({"key 'lr'": 0.1, "the version of torch": "2.13"})
    with pytest.raises(InputError, match=r"the version of torch is 2.11, but 2.13 on the first process"):
        refuse_differences({"key 'lr'": 0.1, "the version of torch": "2.11"})
