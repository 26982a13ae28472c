"""What all processes agree on, in one process; test_lost_processes.py has real ones."""

import socket
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from chorus import collectives
from chorus.collectives import lost_processes_named, on_every_process, on_first_process, refuse_differences
from chorus.errors import InputError, LostProcess, RunError


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
