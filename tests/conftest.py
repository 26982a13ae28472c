"""The tests run offline, on the CPU unless marked `gpu`, and from the repository's root."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # toy tensors: a second thread only waits
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CACHE = tempfile.TemporaryDirectory(
    prefix="chorus-tests-"
)  # tokenised rows, of these tests and what they start
os.environ["HF_DATASETS_CACHE"] = CACHE.name


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what the processes of one test run learn about launchers: see helpers/preloaded.py."""
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist inherit it
        folder = tempfile.TemporaryDirectory(prefix="chorus-launchers-")
        os.environ["CHORUS_TEST_LAUNCHERS"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none. Files that start processes come first: they take longest,
    and one that came last would leave a core idle.
    """
    long = {item.path for item in items if item.get_closest_marker("launch")}
    items.sort(key=lambda item: item.path not in long)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Default paths, such as the bundled base, are relative to the working directory."""
    monkeypatch.chdir(Path(__file__).parents[1])


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """An Accelerator of one plain process."""
    from accelerate import Accelerator  # it reads the variables above as it is imported
    from accelerate.state import AcceleratorState

    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
