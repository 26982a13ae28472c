"""How much a process may use, and the most that it held."""

import psutil
import pytest
import torch

from chorus.monitoring.memory import memory_limit, memory_line, memory_usage, peak_bytes

CPU = torch.device("cpu")


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    alone = memory_limit(CPU, 1.0)
    assert 0 < alone <= psutil.virtual_memory().total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_limit(CPU, 1.0) == pytest.approx(alone / 4, rel=0.25)  # others use memory meanwhile
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert memory_limit(CPU, 0.5) == pytest.approx(alone / 2, rel=0.25)


def test_a_peak_is_seen_after_it_is_gone():
    size = 300 * 2**20
    torch.ones(size, dtype=torch.uint8)
    assert peak_bytes(CPU) > psutil.Process().memory_info().rss + 0.8 * size


def test_memory_is_told_in_gigabytes_now_and_at_most():
    usage = memory_usage(torch.device("cpu"))
    kept = torch.ones(50_000_000)  # 0.2 GB
    more = memory_usage(torch.device("cpu"))
    assert 0.19 < more["resident"] - usage["resident"] < 0.3
    assert more["max_resident"] >= more["resident"] > 0
    assert len(kept)
    of_a_gpu = {"allocated": 28.45, "max_allocated": 32.1, "reserved": 35.0}
    assert memory_line(5, torch.device("cuda"), of_a_gpu) == (
        "[Step 5] GPU Memory - Allocated: 28.45GB, Max Allocated: 32.10GB, Reserved: 35.00GB"
    )
