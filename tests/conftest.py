"""The tests run offline, on the CPU unless marked `gpu`, and from the repository's root."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy tensors: a second thread only waits
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Default paths, such as the bundled base, are relative to the working directory."""
    monkeypatch.chdir(Path(__file__).parents[1])
