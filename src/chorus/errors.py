"""What went wrong, said in one line, and the exit codes: 2 bad input, 3 a fault of the run, 4 preempted and saved,
130 interrupted."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # that ask a run to stop


class InputError(ValueError):
    """A mistake in what the user gave us. The message is one line: where, which key, which value, what to do.

    Raised from inputs that every process reads alike, so every process raises it, with the same words.
    """


class RunError(RuntimeError):
    """A run that cannot go on, such as when losses stay non-finite. One line: which agent, which step, what to do."""


class LostProcess(RunError):
    """Another process of the run is gone, or does not answer."""


class Preempted(Exception):
    """A SIGTERM or SIGINT has ended the run after a step, and all of it is saved. One line: where, how to go on."""


@contextmanager
def input_errors_end_the_program() -> Iterator[None]:
    """Print an error that is meant for people as one line on stderr and exit with its code.

    Every other exception keeps its traceback: it is a mistake of ours.
    """
    try:
        yield
    except InputError as error:
        _exit(f"error: {error}", 2)
    except LostProcess as error:
        _say(f"error: {error}")
        os._exit(3)  # Python's own end may wait for a group's threads, and these for the lost process
    except RunError as error:
        _exit(f"error: {error}", 3)
    except Preempted as preempted:
        _exit(str(preempted), 4)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _exit(line: str, code: int) -> None:
    _say(line)
    raise SystemExit(code) from None


def _say(line: str) -> None:
    """In one write: under torchrun Python has no buffers, and after `print`'s first write another process may write."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
