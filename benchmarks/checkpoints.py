"""What a save adds to a step: `python benchmarks/checkpoints.py [--steps N] [key=value ...]`.

It runs the same training twice in this process, without saves and with one after every step; by default with
the settings of configs.yaml. Times are medians: of a step, from log line to log line; of a save, and of the
fsync calls in it, one for each file and folder; of verifying and reading the last checkpoint, as a resume
does.
"""

import argparse
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train
from chorus.checkpoint import export
from chorus.checkpoint.store import Checkpointer, checkpoints, read_tensors, verify
from chorus.config import load_config


def timed(act: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """`act`, with the time of each call appended to `seconds`."""

    def call(*arguments: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return act(*arguments, **more)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def step_ms(output_dir: Path) -> float:
    """Median time between the log lines of two steps; the first three steps warm up."""
    lines = re.findall(
        r"^(\S+ \S+) INFO chorus\.monitoring\.run_log: step ",
        (output_dir / "train.log").read_text(),
        re.MULTILINE,
    )
    times = [datetime.strptime(line, "%Y-%m-%d %H:%M:%S,%f").timestamp() for line in lines]
    return 1000 * statistics.median(b - a for a, b in itertools.pairwise(times[3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    settings = [*options.settings, f"max_train_steps={options.steps}", "logging_steps=1", "eval_samples=0"]
    saves: list[float] = []
    syncs: list[float] = []
    Checkpointer.save = timed(Checkpointer.save, saves)
    os.fsync = timed(os.fsync, syncs)
    with tempfile.TemporaryDirectory(prefix="chorus-") as place:
        folders = {save_steps: Path(place, str(save_steps)) for save_steps in (0, 1)}
        for save_steps, folder in folders.items():
            saves.clear()
            syncs.clear()
            os.chdir(ROOT)
            train.main(load_config([*settings, f"save_steps={save_steps}", f"output_dir={folder}"]))
        last = checkpoints(folders[1])[0]
        size = sum(file.stat().st_size for file in last.rglob("*") if file.is_file())
        verifies: list[float] = []
        reads: list[float] = []
        for _ in range(10):
            saved = timed(verify, verifies)(last)
            timed(read_tensors, reads)(last, saved.optimizer_step)
        num_syncs = len(syncs) // len(saves)
        without, with_saves = (step_ms(folder) for folder in folders.values())
    print(
        f"a checkpoint of {size:,} bytes ({export.ADAPTER_FILE} of each agent, optimizer.safetensors and "
        "the rest)"
    )
    print(f"a step without a save   {without:7.1f} ms")
    print(f"a step with one         {with_saves:7.1f} ms")
    print(f"the save                {1000 * statistics.median(saves):7.1f} ms")
    print(f"  of it {num_syncs:3} x fsync     {1000 * sum(syncs) / len(saves):7.1f} ms (mean)")
    print(f"verify, as a resume     {1000 * statistics.median(verifies):7.1f} ms")
    print(f"read, as a resume       {1000 * statistics.median(reads):7.1f} ms")


if __name__ == "__main__":
    main()
