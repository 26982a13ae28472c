"""SIGTERM and SIGINT while training: the current step ends, and every process stops after the same step."""

import os
import signal
import time
from datetime import timedelta
from types import FrameType

import torch
from accelerate import Accelerator

from chorus.errors import SIGNALS, Preempted
from chorus.spans import span
from chorus.training.step import StepDone

# Ctrl-C reaches a process from the terminal and again from its launcher, which passes it on.
ONE_REQUEST_S = 3.0


class StopRequest:
    """Within its context, the first SIGTERM or SIGINT is remembered; a second one, seconds later, ends the
    process.

    When Preempted, a RunError or a lost process ends the context, the process has only its last line left to
    print: signals are then ignored to the end of the process.
    """

    def __init__(self, accelerator: Accelerator, timeout_s: int):
        self._received: float | None = None
        self._number = 0
        self._is_told = False
        self._group = None
        self._has_others = accelerator.num_processes > 1
        if self._has_others and torch.distributed.get_backend() != "gloo":
            # On the CPU: a collective on the GPU would wait for all work that is queued there, at every step.
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # torchrun passes on both of two signals, and sends one when another process has ended. None may take
        # away the last line and the exit code. SIG_IGN and no handler of Python's: Python removes those
        # before it ends. Libraries raise RuntimeError for a lost process.
        is_last = kind is not None and issubclass(kind, Preempted | RuntimeError | MemoryError)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if is_last else handler)
        # It came after the last step was saved.
        if self._received is not None and not self._is_told and kind is None:
            os.kill(os.getpid(), self._number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received, self._number = now, number
        elif now - self._received > ONE_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def after_step(self, step: StepDone) -> None:
        """End training after this step if any process has received a signal. A collective call."""
        if self.is_agreed():
            step.end(
                Preempted(
                    f"stopped and saved after step {step.number}; resume_from_checkpoint=auto goes on "
                    "from there"
                )
            )

    def is_agreed(self) -> bool:
        """Whether any process has received a signal: the same answer on all. A collective call."""
        self._is_told = self._received is not None
        if not self._has_others:
            return self._is_told
        received = torch.tensor([self._is_told], dtype=torch.int32)
        with span("communication"):
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(received)
