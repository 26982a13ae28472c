"""SIGTERM and SIGINT while training: the current step ends, and every process stops after the same step.

An evaluation after that step ends between two of its batches.
"""

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from chorus.errors import SIGNALS, Preempted, end_now, signal_at_end_of_launcher
from chorus.spans import span
from chorus.training.step import StepDone

# Ctrl-C reaches a process from the terminal and again from its launcher, which passes it on.
ONE_REQUEST_S = 3.0


def stopped_after(step: StepDone, what: str = "") -> Preempted:
    """The error with which a signal ends training, after this step is saved."""
    return Preempted(
        f"stopped and saved after step {step.number}{what}; resume_from_checkpoint=auto resumes from there"
    )


class StopRequest:
    """Within its context, from the end of the first step on, a first SIGTERM or SIGINT is recorded, and
    training ends after the current step. A second one, at least `ONE_REQUEST_S` seconds later, ends the
    process at once with code 130.

    Before that, signals still end the process at once: during the first step, which may compile for minutes,
    there is nothing to save.

    If Preempted, a RunError or a lost process ends the context, the process only has to print its last line:
    signals are then ignored until it ends.
    """

    def __init__(self, accelerator: Accelerator, timeout_s: int):
        self._before: dict[int, Any] = {}
        self._received: int | None = None
        self._is_told = False
        self._group = None
        self._has_others = accelerator.num_processes > 1
        if self._has_others and torch.distributed.get_backend() != "gloo":
            # On the CPU: a collective on the GPU would wait for all work queued there, at every step.
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def __enter__(self) -> "StopRequest":
        return self

    def _begin_to_remember(self) -> None:
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        arrivals, self._to_watcher = os.pipe()
        os.set_blocking(self._to_watcher, False)
        self._fd_before = signal.set_wakeup_fd(self._to_watcher, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_a_second_signal, args=(arrivals,), daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # torchrun forwards both of two signals, and sends one when another process has ended. None may
        # prevent the last line or change the exit code. SIG_IGN and not a Python handler: Python removes its
        # handlers before it exits. Libraries raise RuntimeError for a lost process.
        is_last = kind is not None and issubclass(kind, Preempted | RuntimeError | MemoryError)
        if self._before:
            signal.set_wakeup_fd(self._fd_before)
            os.close(self._to_watcher)
        for number in SIGNALS if is_last else self._before:
            signal.signal(number, signal.SIG_IGN if is_last else self._before[number])
        # The signal came after the last step was saved.
        if self._received is not None and not self._is_told and kind is None:
            os.kill(os.getpid(), self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        signal_at_end_of_launcher(0)  # the context may end seconds later, which is not a second request

    def after_step(self, step: StepDone) -> None:
        """End training after this step if any process has received a signal. A collective call."""
        if self.is_agreed():
            step.end(stopped_after(step))

    def pause(self, is_working: bool) -> bool:
        """To be called between batches of work, such as an evaluation, of which processes have different
        numbers. A collective call.

        A process calls it with True after each of its batches. Once it has done all of them it calls with
        False until no process works any more, which is what is returned. So every process makes the same
        number of calls, and all end the work in the same one.

        Raises:
            Preempted: on every process alike: any of them has received a signal.
        """
        is_stopped, do_any_work = self._any(is_working)
        if is_stopped:
            raise Preempted("stopped between two batches")
        return do_any_work

    def is_agreed(self) -> bool:
        """Whether any process has received a signal: the same answer on all. A collective call.

        From the first call on, signals are recorded.
        """
        if not self._before:
            self._begin_to_remember()
        return self._any()[0]

    def _any(self, *own: bool) -> list[bool]:
        """Whether any process has received a signal, and of each flag whether any process has set it."""
        self._is_told = self._received is not None
        flags = [self._is_told, *own]
        if not self._has_others:
            return flags
        of_all = torch.tensor(flags, dtype=torch.int32)
        with span("communication"):
            torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in of_all.tolist()]


def _end_at_a_second_signal(arrivals: int) -> None:
    """The target of a thread: end the process when a second request is written to this pipe.

    Python handles a signal between two instructions of the main thread, and a call may take seconds, such as
    a save on a slow disk or a wait for another process. In a Python handler the two signals of one Ctrl-C
    could then seem far apart, and a second request would not end the process before the call returns.
    """
    first: float | None = None
    while numbers := os.read(arrivals, 512):
        asked = [signal.Signals(number) for number in numbers if number in SIGNALS]
        now = time.monotonic()
        if asked and first is None:
            first = now
        elif asked and first is not None and now - first > ONE_REQUEST_S:
            end_now(
                f"ended at once by a second {asked[0].name}: resume_from_checkpoint=auto resumes from "
                "the last checkpoint, if there is one",
                130,
            )
    os.close(arrivals)
