"""Agreement between processes: shared errors, equal inputs and tensors, timeouts, and lost processes."""

import hashlib
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed import distributed_c10d

from chorus.errors import InputError, LostProcess, RunError

T = TypeVar("T")


def on_first_process(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Run `act` on the first process only. A collective call.

    Every process returns its result, or raises its InputError or RunError: otherwise the others would wait
    for a process that has ended.
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


def on_first_of_each_host(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Run `act` on the first process of each host; its result on every process of that host. A collective
    call.

    Raises:
        InputError or RunError of `act`, on every process alike: the first one, with its host if other hosts
            succeeded.
    """
    outcome: tuple[T | None, InputError | RunError | None] = None, None
    if accelerator.is_local_main_process:
        try:
            outcome = act(), None
        except (InputError, RunError) as error:
            outcome = None, error
    own = socket.gethostname()
    outcomes = [one for one in gather_object([(own, accelerator.is_local_main_process, *outcome)]) if one[1]]
    errors = [(host, error) for host, _, _, error in outcomes if error is not None]
    for host, error in errors:
        raise error if len(errors) == len(outcomes) else type(error)(f"{error} (on host {host})")
    return next(result for host, _, result, _ in outcomes if host == own)


def on_every_process(act: Callable[[], None]) -> None:
    """Run `act` on every process; if any raises an InputError or RunError, all do. A collective call.

    They raise the first one, with the name of its host. Hosts may see different files, and a process that
    ended alone would leave the others waiting.
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


def refuse_differences(
    own: Mapping[str, Any], first: int = 0, group: torch.distributed.ProcessGroup | None = None
) -> None:
    """Raise InputError on every process if the value of any differs from the first process's. A collective
    call.

    Hosts have files of their own. If those differ, a mixture of two runs would be trained silently.

    Args:
        own: this process's values, by their names in the message.
        first, group: compare within this group of processes, whose first one has rank `first`; None: all.
            Even so it is a collective call of all processes, and all raise alike.
    """
    firsts: list = [own]
    if group is None:
        broadcast_object_list(firsts)
    else:
        torch.distributed.broadcast_object_list(firsts, src=first, group=group)
    which = "the first process" if first == 0 else f"process {first}"

    def compare() -> None:
        for name, value in firsts[0].items():
            if own.get(name) != value:
                raise InputError(
                    f"{name} is {own.get(name)}, but {value} on {which}; start every host with "
                    "the same command, files and versions"
                )

    on_every_process(compare)


def described(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Named tensors in order, for `refuse_differences`: name, shape and a digest of 16 values of each."""
    named = list(tensors)
    digests = [hashlib.sha256(values).hexdigest()[:8] for values in sampled([tensor for _, tensor in named])]
    lines = [
        f"{name} {list(own.shape)} of values {digest}"
        for (name, own), digest in zip(named, digests, strict=True)
    ]
    return {"the number of tensors": len(lines)} | {
        f"tensor {place}": line for place, line in enumerate(lines)
    }


def sampled(tensors: Sequence[Tensor]) -> list[bytes]:
    """16 evenly spaced values of each tensor, as fp32 bytes. All tensors take one copy from the device."""
    flat = [tensor.detach().flatten() for tensor in tensors]
    places = [torch.arange(16, device=one.device) * max(len(one) - 1, 0) // 15 for one in flat]
    values = [
        one[place].float() if len(one) else one.float() for one, place in zip(flat, places, strict=True)
    ]
    pieces = torch.cat(values).cpu().split([len(value) for value in values])
    return [piece.numpy().tobytes() for piece in pieces]


def limit_waiting(seconds: int) -> None:
    """Give this timeout to every existing process group. Libraries create groups with a default of their own.

    Under gloo a collective call then raises. Under NCCL the watchdog ends the process.
    """
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def lost_processes_named(timeout_s: int) -> Iterator[None]:
    """Raise LostProcess, a RunError, if a collective call fails because another process has ended or does not
    answer.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        is_silent = re.search(r"gloo.*time(d )?out|wait timeout", text, re.DOTALL | re.IGNORECASE)
        is_gone = re.search(
            r"gloo.*(closed|reset by peer|broken pipe|refused)", text, re.DOTALL | re.IGNORECASE
        )
        if not (is_silent or is_gone or isinstance(error, torch.distributed.DistError)):
            raise
        place = next(
            frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if _is_ours(frame.filename)
        )
        what = (
            f"did not answer within {timeout_s} s, key 'collective_timeout_s'," if is_silent else "has ended"
        )
        raise LostProcess(
            f"process {os.environ.get('RANK', 0)}: another process {what} while this one waited for it in "
            f"{place.name} ({Path(place.filename).name}:{place.lineno}); see its last lines, then resume "
            "with resume_from_checkpoint=auto"
        ) from error


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(Path(__file__).parent) or Path(file).name == "train.py"
