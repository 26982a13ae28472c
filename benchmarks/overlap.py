"""How much of a step is communication that nothing hides, from a trace of the GPU's kernels.

A kernel of NCCL occupies the GPU from its start on every process to the end of the transfer. So its time is
transfer and waiting for the slowest process. Of both, what runs beside a kernel that computes is hidden.
"""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from timing import wait
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NCCL = "nccl"  # in the name of every kernel that communicates
Span = tuple[float, float]


class Kernel(NamedTuple):
    """A kernel on the GPU; microseconds."""

    begin: float
    end: float
    name: str


def traced(step: Callable[[], Any], accelerator: Accelerator) -> dict[str, float]:
    """Milliseconds of one more step, means over processes: those of `split`, with `_ms` behind the name, and
    `waiting_ms`, see `waiting`. A collective call; empty on a CPU."""
    if accelerator.device.type != "cuda":
        return {}
    accelerator.wait_for_everyone()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        wait(accelerator.device)
    events = profiler.events() or ()
    kernels = [
        Kernel(event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    own = [end - begin for begin, end, name in sorted(kernels) if NCCL in name.lower()]
    parts: list[dict[str, float]] = gather_object([split(kernels)])
    waited = waiting(gather_object([own]))
    mean = {f"{name}_ms": fmean(part[name] for part in parts) / 1000 for name in parts[0]}
    return mean | {"waiting_ms": waited / 1000}


def split(kernels: Sequence[Kernel]) -> dict[str, float]:
    """What a GPU does from its first kernel to its last one, in the unit of the kernels' times.

    step: all of it. communication: kernels of NCCL run. exposed: they run, and nothing computes beside them.
    idle: no kernel runs, so the GPU waits for the host.
    """
    sent = merged([(kernel.begin, kernel.end) for kernel in kernels if NCCL in kernel.name.lower()])
    computed = merged([(kernel.begin, kernel.end) for kernel in kernels if NCCL not in kernel.name.lower()])
    whole = merged([*sent, *computed])
    step = whole[-1][1] - whole[0][0] if whole else 0.0
    return {
        "step": step,
        "communication": length(sent),
        "exposed": length(whole) - length(computed),
        "idle": step - length(whole),
    }


def waiting(of_processes: Sequence[Sequence[float]]) -> float:
    """The time, a mean over processes, in which kernels of NCCL wait for others: what each takes beyond the
    shortest of its counterparts. NaN where processes did not start as many."""
    if len({len(own) for own in of_processes}) > 1:
        return float("nan")
    calls = list(zip(*of_processes, strict=True))
    return sum(fmean(call) - min(call) for call in calls)


def merged(spans: Sequence[Span]) -> list[Span]:
    """Spans that do not overlap, in order, over the same time."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(spans: Sequence[Span]) -> float:
    return sum(end - begin for begin, end in spans)
