"""A trace of two steps by PyTorch's profiler, in files that need no installed viewer."""

import gzip
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.cuda._memory_viz import trace_plot
from torch.profiler import ProfilerActivity, profile, record_function

from chorus.errors import RunError
from chorus.monitoring.flame_graph import Stack, flame_graph
from chorus.progress import announced
from chorus.spans import listening

logger = logging.getLogger(__name__)

Clock = Literal["host", "device"]
TRACE, OPERATORS = "trace.json.gz", "top_operators.txt"
MEMORY = "memory.html"  # the page loads torch's viewer from the internet
FLAMES = {"host": "flame_graph.html", "device": "flame_graph_gpu.html"}
SPAN, OPERATOR, MODULE = "user_annotation", ("cpu_op", "cuda_runtime", "cuda_driver"), "nn.Module: "
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Trace(NamedTuple):
    """The profiler, and the allocator's snapshots: one after a trace on a GPU, otherwise none."""

    profiler: profile
    snapshots: list[Any]


@contextmanager
def tracing(device: torch.device) -> Iterator[Trace]:
    """Trace what runs in this context, with the names of spans. `write_trace` then writes the files."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    snapshots: list[Any] = []
    with (
        listening(record_function),
        _memory_history(snapshots) if on_gpu else nullcontext(),
        profile(activities=activities, with_stack=True) as profiler,  # stacks give the names of modules
    ):
        yield Trace(profiler, snapshots)
        if on_gpu:
            torch.cuda.synchronize(device)


@announced("writing the trace")
def write_trace(trace: Trace, folder: Path) -> None:
    """Write the files of a trace into `folder`.

    Raises:
        RunError: they cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
        trace.profiler.export_chrome_trace(str(folder / TRACE))
        with gzip.open(folder / TRACE, "rt", encoding="utf-8") as file:
            _write_readable(json.load(file)["traceEvents"], folder)
        for snapshot in trace.snapshots:
            (folder / MEMORY).write_text(trace_plot(snapshot), encoding="utf-8")
    except OSError as error:
        remedy = "make room, or set profile_trace to false"
        raise RunError(f"{folder}: the trace could not be written: {error}; {remedy}") from error
    logger.info("wrote the trace; %s shows where the time of its steps went", folder / FLAMES["host"])


def _write_readable(events: Sequence[Mapping[str, Any]], folder: Path) -> None:
    on_gpu = any(event.get("cat") in ON_DEVICE for event in events)
    clocks: tuple[Clock, ...] = ("device", "host") if on_gpu else ("host",)
    for clock in clocks:
        page = flame_graph(stacks(events, clock), "GPU time" if clock == "device" else "Host time")
        (folder / FLAMES[clock]).write_text(page, encoding="utf-8")
    tables = [operator_table(events, clock) for clock in clocks]
    (folder / OPERATORS).write_text("\n\n".join(tables) + "\n", encoding="utf-8")


@contextmanager
def _memory_history(snapshots: list[Any]) -> Iterator[None]:
    """Append a snapshot of the GPU allocator's events in this context, with their stacks."""
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        yield
        snapshots.append(torch.cuda.memory._snapshot())
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


class Event(NamedTuple):
    """An event on the host. `correlation` identifies the kernel
    it launched, if any. Times in microseconds."""

    begin: float
    end: float
    name: str
    is_operator: bool
    correlation: Any


def stacks(events: Sequence[Mapping[str, Any]], clock: Clock) -> dict[Stack, float]:
    """Self time of each stack in microseconds, from the events of PyTorch's Chrome trace.

    Spans, modules and operators nest by their times. The backward threads count as part of the thread that
    waits for them. With clock `device` a stack ends in a kernel and has the time of its kernels.
    """
    own: dict[Stack, float] = defaultdict(float)
    launched: dict[Any, Stack] = {}
    for stack, event, time in _nested(events):
        if event.correlation is not None:
            launched[event.correlation] = stack
        if clock == "host":
            own[stack] += time
    if clock == "device":
        for event in events:
            stack = launched.get(event.get("args", {}).get("correlation"))
            if event.get("cat") in ON_DEVICE and stack is not None:
                own[(*stack, event["name"])] += event["dur"]
    return dict(own)


def operator_table(events: Sequence[Mapping[str, Any]], clock: Clock, rows: int = 40) -> str:
    """A table of the most expensive operators (kernels with clock `device`), by self time in the whole trace.

    torch's `key_averages` takes minutes on a trace with stacks, and counts every Python function.
    """
    if clock == "host":
        seen = [(event.name, time) for _, event, time in _nested(events) if event.is_operator]
    else:
        seen = [(event["name"], event["dur"]) for event in events if event.get("cat") in ON_DEVICE]
    total, calls = defaultdict(float), defaultdict(int)
    for name, time in seen:
        total[name] += time
        calls[name] += 1
    whole = sum(total.values()) or 1.0
    lines = [
        f"{'own ms':>12} {'share':>7} {'calls':>8}  "
        f"{'kernel' if clock == 'device' else 'operator, on the host'}"
    ]
    for name in sorted(total, key=lambda name: -total[name])[:rows]:
        lines.append(f"{total[name] / 1000:12.3f} {total[name] / whole:7.1%} {calls[name]:8,}  {name}")
    return "\n".join(lines)


def _nested(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Stack, Event, float]]:
    """Each event with its stack and self time. An event ends with its parent at the latest."""
    held: list[list[Any]] = []  # stack, event, end, own time

    def closed(until: float) -> Iterator[tuple[Stack, Event, float]]:
        while held and held[-1][2] <= until:
            stack, event, _, own = held.pop()
            yield stack, event, own

    for event in sorted(_host_events(events), key=lambda event: (event.begin, -event.end)):
        yield from closed(event.begin)
        end = min(event.end, held[-1][2]) if held else event.end
        if held:
            held[-1][3] -= end - event.begin
        held.append([(*(held[-1][0] if held else ()), event.name), event, end, end - event.begin])
    yield from closed(float("inf"))


def _host_events(events: Sequence[Mapping[str, Any]]) -> Iterator[Event]:
    """The events of the thread that trains and of the threads that run its backward."""
    threads = {event["tid"] for event in events if event.get("cat") == SPAN or _is_a_node(event)}
    for event in events:
        category = event.get("cat")
        is_operator = category in OPERATOR and not _is_a_node(event)
        is_module = category == "python_function" and event["name"].startswith(MODULE)
        if (is_operator or is_module or category == SPAN) and event["ph"] == "X" and event["tid"] in threads:
            # The trace numbers layers and steps. Without the numbers their times add up.
            name = re.sub(rf"^({MODULE})(.*)_\d+$|^(step) \d+$", r"\2\3", event["name"])
            correlation = event.get("args", {}).get("correlation")
            yield Event(event["ts"], event["ts"] + event["dur"], name, is_operator, correlation)


def _is_a_node(event: Mapping[str, Any]) -> bool:
    """Whether this is autograd's frame around an operator, which identifies the backward threads."""
    return event.get("name", "").startswith("autograd::engine::evaluate_function: ")
