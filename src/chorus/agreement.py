"""What all processes must know alike: how an act ended, what the run is, and whether it shall stop."""

import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from chorus.errors import InputError, RunError
from chorus.spans import span

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_S = 3.0  # Ctrl-C reaches a process from the terminal and again from its launcher, which passes it on


def on_first_process(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Run `act` on the first process alone; its result, or its InputError or RunError, on every one. A collective call.

    Without it the others would wait for a process that has given up.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [act(), None]
        except (InputError, RunError) as error:
            outcome = [None, error]
    broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_every_process(act: Callable[[], None]) -> None:
    """Run `act` on every process; where any raises an InputError or RunError, all raise the first. A collective call.

    Hosts differ in what they see, and one that gave up alone would leave the others waiting for it.
    """
    error = None
    try:
        act()
    except (InputError, RunError) as raised:
        error = raised
    outcomes: list[tuple[InputError | RunError | None, str]] = gather_object([(error, socket.gethostname())])
    of_all = all(error is not None for error, _ in outcomes)
    for error, host in outcomes:
        if error is not None:
            raise error if of_all else type(error)(f"{error} (on host {host})")


def refuse_differences(own: Mapping[str, Any]) -> None:
    """Raise InputError, on every process alike, where one of them has another value than the first. A collective call.

    Hosts have files of their own: where those differ, a mixture of two runs would be trained, without a word.

    Args:
        own: this process's values, by what they are called in the message.
    """
    firsts: list = [own]
    broadcast_object_list(firsts)

    def compare() -> None:
        for name, value in firsts[0].items():
            if own[name] != value:
                raise InputError(
                    f"{name} is {own[name]}, but {value} on the first process; start every host with the same command, "
                    "files and versions"
                )

    on_every_process(compare)


class StopRequest:
    """Within its context, the first SIGTERM or SIGINT is remembered, and a second one, seconds later, ends at once."""

    def __init__(self, accelerator: Accelerator):
        self._received: float | None = None
        self._group = None
        self._has_others = accelerator.num_processes > 1
        if self._has_others and torch.distributed.get_backend() != "gloo":
            # Over the CPU: asking on the GPU would wait for all that is queued there, at every step.
            self._group = torch.distributed.new_group(backend="gloo")

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = now
        elif now - self._received > ONE_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def is_agreed(self) -> bool:
        """Whether any process has received a signal: the same answer on all, at the same step. A collective call."""
        if not self._has_others:
            return self._received is not None
        received = torch.tensor([self._received is not None], dtype=torch.int32)
        with span("communication"):
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(received)
