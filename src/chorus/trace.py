"""Two steps as PyTorch's profiler sees them, in files that a browser shows without anything being installed."""

import gzip
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.cuda._memory_viz import trace_plot
from torch.profiler import ProfilerActivity, profile, record_function

from chorus.flame_graph import flame_graph, stacks
from chorus.spans import listening

logger = logging.getLogger(__name__)

TRACE, OPERATORS, MEMORY = "trace.json.gz", "top_operators.txt", "memory.html"
FLAMES, GPU_FLAMES = "flame_graph.html", "flame_graph_gpu.html"
PYTHON = re.compile(r"nn\.Module: |<built-in |.*\(\d+\): ")  # functions, of which the stacks are made


@contextmanager
def traced(folder: Path, device: torch.device) -> Iterator[None]:
    """Trace what runs in this context, spans named, and write the files into `folder` at its end; not if it fails."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with (
        listening(record_function),
        _memory_history(folder / MEMORY) if on_gpu else nullcontext(),
        profile(activities=activities, with_stack=True) as profiler,
    ):
        yield
        if on_gpu:
            torch.cuda.synchronize(device)
    folder.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / TRACE))
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages = profiler.key_averages()
    averages[:] = [each for each in averages if not PYTHON.match(each.key)]
    table = averages.table(sort_by=key, row_limit=40, max_name_column_width=90)
    (folder / OPERATORS).write_text(table, encoding="utf-8")
    with gzip.open(folder / TRACE, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    (folder / FLAMES).write_text(flame_graph(stacks(events, "host"), "Host time"), encoding="utf-8")
    if on_gpu:
        (folder / GPU_FLAMES).write_text(flame_graph(stacks(events, "device"), "GPU time"), encoding="utf-8")
    logger.info("two steps are traced; %s shows where their time went", folder / FLAMES)


@contextmanager
def _memory_history(page: Path) -> Iterator[None]:
    """A page on what the GPU's allocator did in this context, and who called it. Its viewer comes from the web."""
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    try:
        yield
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    page.parent.mkdir(exist_ok=True)
    page.write_text(trace_plot(snapshot), encoding="utf-8")
