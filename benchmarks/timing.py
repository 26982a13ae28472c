"""How long a step takes, and the yardstick beside it."""

import gc
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

import psutil
import torch

TIMED_S = 12.0  # of a row whose steps are slow, fewer are timed, but three


def warm_up(step: Callable[[], object], device: torch.device) -> float:
    """Two steps, then seconds of a third; and the allocator begins to measure anew.

    Those before the first timed one leave nothing behind: neither garbage, nor memory that compiling took.
    """
    step()
    wait(device)
    started = time.perf_counter()
    step()
    wait(device)
    seconds = time.perf_counter() - started
    gc.collect()
    gc.freeze()  # as in train.py
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return seconds


def num_timed(most: int, seconds: float) -> int:
    """How many steps of so many seconds are timed."""
    return min(most, max(3, int(TIMED_S / seconds)))


def timed(step: Callable[[], object], steps: int, device: torch.device) -> Iterator[float]:
    """Milliseconds from the start of one step to the start of the next: the host may not fall behind unseen."""
    if device.type != "cuda":
        for _ in range(steps):
            started = time.perf_counter()
            step()
            yield 1000 * (time.perf_counter() - started)
        return
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    wait(device)
    for before, after in pairwise(marks):
        yield before.elapsed_time(after)


def deadline(seconds: float) -> float:
    """When a command that is given so many seconds has had them, its imports included; by time.monotonic()."""
    return time.monotonic() + seconds - (time.time() - psutil.Process().create_time())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reserved_gib(device: torch.device) -> float | None:
    """The most that the allocator has held since the warm-up, captured passes' own memory included."""
    return torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The yardstick: a square matrix product on random data, timed here and now."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    times = list(timed(lambda: a @ b, 20, device))
    return 2 * size**3 / median(times) / 1e9
