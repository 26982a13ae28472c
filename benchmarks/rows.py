"""What many rows cost a start: seconds to the first step, and resident memory of each process.

    python benchmarks/rows.py [--rows 100000] [--processes 1] [--checkout .]

Rows of 300 characters are written to a folder of its own, and `train.py` of the checkout takes one step of
them: first without a cache, then again. A run of 100 rows before tells what a start costs without rows;
memory is what is grown beyond that one's, anonymous memory (of the process alone) and mapped files (shared by
all) apart.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CHARACTERS = 300
SETTINGS = [
    "num_agents=2",
    "lora_rank=2",
    "batch_size=4",
    "max_train_steps=1",
    "eval_samples=0",
    "logging_steps=1",
]
SETTINGS += ["max_seq_length=128", "resume_from_checkpoint=null"]


def write_rows(path: Path, count: int) -> None:
    """`count` rows of prompt and answer, of 300 characters together with the template's."""
    draw = random.Random(0)
    words = [
        "Ada",
        "Ben",
        "Clara",
        "has",
        "gives",
        "finds",
        "12",
        "7",
        "35",
        "apples",
        "coins",
        "eggs",
        "and",
        "then",
    ]
    with path.open("w") as file:
        for number in range(count):
            text = f"{number}: " + " ".join(draw.choices(words, k=70))
            file.write(
                json.dumps({"question": text[: CHARACTERS - 30], "answer": f"{number % 97} apples"}) + "\n"
            )


def memory_of(pid: int) -> tuple[float, float]:
    """MiB of anonymous memory and of mapped files that are resident now."""
    status = Path(f"/proc/{pid}/status").read_text()
    anonymous, files = (re.search(rf"{name}:\s+(\d+)", status) for name in ("RssAnon", "RssFile"))
    return int(anonymous[1]) / 1024 if anonymous else 0, int(files[1]) / 1024 if files else 0


def cpu_of(pid: int) -> float:
    """Seconds of processor time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def trainers_of(mark: str) -> list[int]:
    """The processes that train, told from what started them by the mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = mark.encode() in (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if (
            is_ours
            and b"train.py" in command
            and b"torchrun" not in command
            and b"torch.distributed.run" not in command
        ):
            found.append(int(folder.name))
    return sorted(found)


def start(
    checkout: Path, rows: Path, processes: int, folder: Path
) -> tuple[float, float, list[tuple[float, float]]]:
    """Seconds to the end of the first step, processor seconds of
    all until then, and the most memory of each."""
    mark = f"CHORUS_ROWS={folder}-{time.monotonic_ns()}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(checkout / "src"), "HF_DATASETS_CACHE": str(folder / "cache")}
    name, value = mark.split("=")
    launcher = [sys.executable]
    if processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    command = [*launcher, "train.py", f"dataset_name={rows}", f"output_dir={folder}/run", *SETTINGS]
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=checkout,
        env={**environment, name: value},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    most: dict[int, tuple[float, float]] = {}
    cpu: dict[int, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for pid in trainers_of(mark):
                try:
                    now, cpu[pid] = memory_of(pid), cpu_of(pid)
                except OSError:
                    continue
                most[pid] = tuple(map(max, now, most.get(pid, (0.0, 0.0))))  # pyright: ignore[reportArgumentType]

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds, cpu_s, said = 0.0, 0.0, []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if "step 1 " in line and not seconds:
            seconds, cpu_s = time.monotonic() - begun, sum(cpu.values())
    over.set()
    watcher.join()
    if process.wait() or not seconds:
        raise SystemExit("".join(said[-20:]))
    return seconds, cpu_s, [most[pid] for pid in sorted(most)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = folder / "few.jsonl", folder / "many.jsonl"
        write_rows(few, 100)
        write_rows(many, options.rows)
        start(checkout, few, options.processes, folder)  # compiles, and fills the disk's cache
        base_s, base_cpu, base = start(checkout, few, options.processes, folder)
        print(f"100 rows: {base_s:.1f} s to the first step, {base_cpu:.1f} CPU-seconds", flush=True)
        for when in ("first start", "second start"):
            seconds, cpu, memory = start(checkout, many, options.processes, folder)
            grown = [
                f"{own - other:.0f} + {f - g:.0f}" for (own, f), (other, g) in zip(memory, base, strict=True)
            ]
            print(
                f"{options.rows:,} rows, {when}: {seconds:.1f} s, {seconds - base_s:.1f} more; CPU-seconds "
                f"{cpu:.1f}, {cpu - base_cpu:.1f} more; MiB grown, anonymous + mapped, a process: "
                f"{', '.join(grown)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
