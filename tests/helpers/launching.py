"""Starting train.py as its users do, by the real launchers.
Where the launcher is not the matter: preloaded.py."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent
BIN = Path(sys.executable).parent
PATIENCE_S = 1800.0  # after that it hangs; on a busy machine a start alone takes minutes
PLAIN = [str(BIN / "accelerate"), "launch", "train.py"]
ZERO2 = [
    str(BIN / "accelerate"),
    "launch",
    "--config_file",
    "accelerate_config.yaml",
    "--main_process_port",
    "0",
]


def ddp(num_processes: int) -> list[str]:
    return [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={num_processes}", "train.py"]


def zero2(num_processes: int) -> list[str]:
    return [*ZERO2, "--num_processes", str(num_processes), "train.py"]


def environment(**more: str) -> dict[str, str]:
    """On the CPU, also where there is a GPU, since two processes cannot share one. One thread a process: two
    of two threads each on two cores wait for each other most of the time."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def launch(
    command: Sequence[str], *settings: str, timeout: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *settings],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


Run = Callable[..., subprocess.CompletedProcess[str]]


def train(
    command: Sequence[str], output_dir: Path, *settings: str, run: Run = launch
) -> list[dict[str, Any]]:
    """A run that must succeed; its rows of metrics.jsonl, without those that hold scores."""
    result = run(command, f"output_dir={output_dir}", *settings)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "scores" not in row]


def processes_of(folder: Path) -> list[int]:
    """Processes that inherited the environment variable of a run, whatever session or group they moved to."""
    mark, found = f"CHORUS_TEST_RUN={folder}\0", []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.2)
