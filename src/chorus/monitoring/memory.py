"""The memory of a process's device, and its peak usage."""

import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch


def memory_limit(device: torch.device, fraction: float) -> int:
    """Bytes that this process may use: `fraction` of its GPU or of its share of the RAM, and no more than is
    free now.

    On a CPU the processes of this machine share what is available now, within the limit of the container.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(int(fraction * total), free + torch.cuda.memory_reserved(device))
    own = psutil.Process().memory_info().rss
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = psutil.virtual_memory().available + local_processes * own
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2 and 1
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            free = min(free, int(Path("/sys/fs/cgroup", file).read_text()))
    return int(fraction * free / local_processes)


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of a GPU's peak. On a CPU the peak is that of the process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """The peak memory of this process, in bytes.

    On a GPU what the allocator reserved since `reset_peak`: a CUDA graph keeps memory in which no tensor
    lives between replays. On a CPU the resident set since the process began, libraries included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_usage(device: torch.device) -> dict[str, float]:
    """Memory of this process in GB (10^9 bytes), now and at most so far: the GPU's, or resident where there
    is none.

    The memory of a captured pass between replays counts as reserved, not as allocated.
    """
    if device.type == "cuda":
        held = (torch.cuda.memory_allocated, torch.cuda.max_memory_allocated, torch.cuda.memory_reserved)
        names = ("allocated", "max_allocated", "reserved")
        return {name: of(device) / 1e9 for name, of in zip(names, held, strict=True)}
    resident, most = psutil.Process().memory_info().rss, peak_bytes(device)
    return {
        "resident": resident / 1e9,
        "max_resident": max(resident, most) / 1e9,
    }  # the kernel updates its peak late


def memory_line(step: int, device: torch.device, usage: Mapping[str, float]) -> str:
    """`[Step 5] GPU Memory - Allocated: 28.45GB, Max Allocated: 32.10GB, Reserved: 35.00GB`"""
    told = ", ".join(f"{name.replace('_', ' ').title()}: {amount:.2f}GB" for name, amount in usage.items())
    return f"[Step {step}] {'GPU' if device.type == 'cuda' else 'CPU'} Memory - {told}"
