"""Errors for users, in one line, and the exit codes.

2 bad input; 3 a fault of the run; 4 stopped by SIGTERM or SIGINT, with every step saved; 130 ended at once,
by a second signal or an interrupt.
"""

import ctypes
import errno
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # that ask a run to stop
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class InputError(ValueError):
    """A mistake in the user's input. The message is one line: where, which key, which value, what to do.

    All processes read the same input, so every process raises it with the same message.
    """


class RunError(RuntimeError):
    """A run that cannot continue, for example because losses stay non-finite. One line: which agent, which
    step, what to do.
    """


class LostProcess(RunError):
    """Another process of the run has ended, or does not answer."""


class OutOfMemory(RunError):
    """The memory of a device or the host ran out. One line: where, what was requested, what to do."""


class Preempted(Exception):
    """A SIGTERM or SIGINT has ended the run after a step, which is saved. One line: where, and how to
    resume.
    """


@contextmanager
def input_errors_end_the_program() -> Iterator[None]:
    """Print an error for users as one line on stderr, and exit with its code.

    Out-of-memory errors are included. Every other exception keeps its traceback: it is a bug.
    """
    try:
        yield
    except InputError as error:
        _exit(f"error: {error}", 2)
    except (LostProcess, OutOfMemory) as error:
        _say(f"error: {error}", is_consequence=isinstance(error, LostProcess))
        os._exit(3)  # Python's exit may wait for a process group's threads, and these for the other processes
    except RunError as error:
        _exit(f"error: {error}", 3)
    except Preempted as preempted:
        _exit(str(preempted), 4)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except Exception as error:
        found = out_of_memory(error)
        if found is None:
            raise
        _say(f"error: out of memory: {found}; end what else uses the device, or ask for less")
        os._exit(3)


def first_line(error: BaseException) -> str:
    """The first line of the error's text that is not empty; its type where there is none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def out_of_memory(error: BaseException) -> str | None:
    """A short description of the request, if the error or one of its causes is an out-of-memory error; None
    otherwise.

    Memory may run out in torch on a GPU (OutOfMemoryError), in its allocator on the host (RuntimeError), in
    one of CUDA's libraries (a status), in Python or numpy (MemoryError) or in the system (ENOMEM). A capture
    or a compilation raises another error on top.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        is_lack = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        is_lack |= isinstance(error, OSError) and error.errno == errno.ENOMEM
        is_lack |= isinstance(error, RuntimeError) and _LACK.search(text) is not None
        if is_lack:
            asked = re.search(r"(?:[Tt]ried to allocate|Unable to allocate) ([\d.]+ \w+)", text)
            if asked is None:
                return text.partition("\n")[0][:120] or type(error).__name__
            free = re.search(r"of which ([\d.]+ \w+) is free", text)
            size = asked[1]
            if size.endswith(" bytes"):
                size = f"{int(size.split()[0]) / 2**30:.2f} GiB"
            return f"{size} asked for" + (f", {free[1]} free" if free else "")
        error = error.__cause__ or error.__context__  # pyright: ignore[reportAssignmentType]
    return None


_LACK = re.compile(
    r"out of memory|can't allocate memory|Cannot allocate memory|not enough memory|_ALLOC_FAILED",
    re.IGNORECASE,
)


def _exit(line: str, code: int) -> None:
    for number in SIGNALS:
        # A launcher that sees another process end sends SIGTERM, which must not change the exit code.
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_IGN)
    _say(line)
    raise SystemExit(code) from None


def end_on_signals() -> None:
    """From here on SIGTERM or SIGINT ends this process at once, with one line and code 4, also amid an
    import.

    From its first step on training replaces these handlers by its own (`training.signals.StopRequest`), which
    end the step first. Everything else may be interrupted at any moment: files are written atomically, and a
    restarted run resumes.
    """
    for number in SIGNALS:
        signal.signal(number, _end)
    if _is_under_accelerate():
        signal_at_end_of_launcher(signal.SIGTERM)


def _is_under_accelerate() -> bool:
    """Whether `accelerate launch` is the parent, as it is of a run in one process.

    Decided by its program, not by any word of its command: a shell script may have that word in its path, and
    may end before the run that it has started.
    """
    with suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
        return "launch" in words and any(
            Path(word).name == "accelerate" or word.startswith("accelerate.commands") for word in words
        )
    return False


def signal_at_end_of_launcher(number: int) -> None:
    """Make the system send this signal when the parent ends first; 0: none. For the main thread, on Linux.

    `accelerate launch` does not forward signals to its one process: asked to end, it would end alone, and the
    run would continue unnoticed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _end(number: int, _: FrameType | None) -> None:
    for other in SIGNALS:  # a launcher forwards a signal that the terminal has also sent
        signal.signal(other, signal.SIG_IGN)
    end_now(
        f"stopped by {signal.Signals(number).name}: no step is lost; resume_from_checkpoint=auto resumes it",
        4,
    )


def end_now(line: str, code: int) -> NoReturn:
    """End this process with one line, whatever it is doing; from any thread or a signal handler."""
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    _say(line)
    os._exit(code)


def _say(line: str, is_consequence: bool = False) -> None:
    """A single write: under torchrun stderr is unbuffered, and another process may write between two writes
    of `print`.

    A launcher prints its own report afterwards. torchrun's, also used by `accelerate launch` for several
    processes, quotes the line at its end. `accelerate launch` for one process always prints a traceback of
    its own; on a terminal the line is in bold to stand out.
    """
    _tell_torchrun(line, is_consequence)
    is_bold = sys.stderr.isatty() and line.startswith("error: ")
    shown = f"\x1b[1m{line}\x1b[0m\n" if is_bold else f"{line}\n"
    try:
        sys.stdout.flush()  # flush what was printed before
        sys.stderr.write(shown)
        sys.stderr.flush()
    except RuntimeError:  # a signal interrupted a write; Python's buffered writers are not reentrant
        os.write(2, shown.encode(errors="backslashreplace"))


def _tell_torchrun(line: str, is_consequence: bool) -> None:
    """Write the line where torchrun looks for it, in the format of torch.distributed.elastic's error files.

    torchrun reports the earliest failure as the cause: a process that only lost another one must come later.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    when = str(int(time.time()) + is_consequence)
    with suppress(OSError):
        told = {"message": {"message": line, "extraInfo": {"py_callstack": line, "timestamp": when}}}
        Path(file).write_text(json.dumps(told), encoding="utf-8")
