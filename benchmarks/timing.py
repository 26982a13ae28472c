"""The time of a step, and of a large matrix product to compare it with."""

import gc
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median

import psutil
import torch

TIMED_S = 12.0  # seconds of timed steps; at least three are timed, however slow


def warm_up(step: Callable[[], object], device: torch.device) -> float:
    """Take two more steps; the seconds of the second one. Then reset the allocator's peak.

    Neither garbage nor memory used for compiling is left for the timed steps.
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
    """How many steps to time if one takes `seconds`."""
    return min(most, max(3, int(TIMED_S / seconds)))


def timed(step: Callable[[], object], steps: int, device: torch.device) -> Iterator[float]:
    """Milliseconds from the start of a step to the start of the next, so that a slow host shows."""
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
    """The end of a command that may take `seconds`, its imports included, by time.monotonic()."""
    return time.monotonic() + seconds - (time.time() - psutil.Process().create_time())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reserved_gib(device: torch.device) -> float | None:
    """The most that the allocator reserved since the warm-up, the memory of CUDA graphs included."""
    return torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product on random data, timed now."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    times = list(timed(lambda: a @ b, 20, device))
    return 2 * size**3 / median(times) / 1e9
