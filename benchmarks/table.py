"""Memory and time of a step: models x modes x engines x numbers of GPUs, each row in processes of its own.

    python benchmarks/table.py --seconds 540                      # what matters most first
    python benchmarks/table.py --rows "gemma-2-2b fused" "gemma-2-9b zero2 x1"

writes table.md and table.json to --out after every row. A row that table.json has is not measured again, so that the
table can be made in pieces; one that failed is. Names of the rows, in their order: --list. Where there are more GPUs
than a row needs, rows of different models run side by side. What counts as useful work: modes.py.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import psutil
import timing
import torch
from case import Case
from verdicts import ENGINES, MODES, Row, checks, key_of, name_of, with_ratios

ROOT = Path(__file__).parents[1]
# model, K, B, T, recompute
ON_GPU = (
    ("gemma-2-2b", 2, 4, 512, "none"),
    ("gemma-2-2b", 4, 4, 512, "none"),
    ("gemma-2-9b", 4, 4, 1024, "full"),
    ("gemma-2-9b", 8, 4, 1024, "full"),
)
ON_CPU = (("tiny", 2, 2, 16, "none"),)
FIRST = (  # what the first description and the aims are held to, in the order of weight; then all others
    "gemma-2-2b K=4 fused plain x1",
    "gemma-2-9b K=4 sequential zero2 x1",
    "gemma-2-2b K=4 fused zero2 x1",
    "gemma-2-9b K=4 parallel zero2 x1",
    "gemma-2-2b K=4 fused plain x2",
    "gemma-2-2b K=4 fused zero2 x2",
    "gemma-2-2b K=2 sequential plain x1",
    "gemma-2-9b K=4 fused zero2 x1",
    "gemma-2-2b K=2 parallel plain x1",
    "gemma-2-9b K=8 fused zero2 x1",
    "gemma-2-2b K=4 fused plain x4",
    "gemma-2-2b K=4 fused zero2 x4",
)
RATIOS = (("over_plain", "+.1%"), ("scaling", ".0%"))
SHORTEST_ROW_S = 30  # none is begun with less time left


def rows(options: argparse.Namespace, shapes: Sequence[tuple]) -> list[Row]:
    """The rows that the options ask for: those of FIRST, then the smallest numbers of processes."""
    found = []
    for processes in options.processes:
        for engine in ENGINES:
            for mode in MODES:
                for model, K, B, T, recompute in shapes:
                    case = Case(model, mode, K, B, T, recompute, "auto", "auto", attention=options.attention)
                    of_the_launch = {"rank": options.rank, "engine": engine, "processes": processes}
                    found.append({**case._asdict(), **of_the_launch, "steps": options.steps})
    wanted = [row for row in found if not options.rows or any(is_named(row, words) for words in options.rows)]
    return sorted(wanted, key=lambda row: next((i for i, name in enumerate(FIRST) if is_named(row, name)), len(FIRST)))


def is_named(row: Row, words: str) -> bool:
    return set(words.split()) <= set(name_of(row).split())


def launcher(row: Row) -> list[str]:
    """As the README launches train.py; by module, since not every machine has the commands beside its interpreter."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    processes = ["--num_processes", str(row["processes"])]
    if row["engine"] == "zero2":
        return [*accelerate, "--config_file", "accelerate_config.yaml", "--main_process_port", "0", *processes]
    if torch.cuda.is_available():
        several = ["--multi_gpu", "--main_process_port", "0"] if row["processes"] > 1 else []
        return [*accelerate, *several, *processes]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={row['processes']}"]


def measured(row: Row, gpus: Sequence[str], seconds: float) -> Row | None:
    """The row with its figures, or with `failed`: why it has none. None: they did not come in so many seconds."""
    with TemporaryDirectory() as folder:
        file, log = Path(folder) / "figures.json", Path(folder) / "log"
        command = [*launcher(row), str(Path(__file__).with_name("row.py")), json.dumps(row), str(file)]
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        with log.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, env=os.environ | seen)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            end(process)
            return None
        if code != 0 or not file.exists():
            said = log.read_text(errors="replace")
            fault = re.search(r"^(?:\[rank\d+\]: *)?((?:error|[\w.]*(?:Error|Exception)): .+)", said, re.MULTILINE)
            reason = fault.group(1) if fault else f"code {code}: {said.strip()[-150:]}"
            reason = " ".join(reason[:200].replace("|", "/").split())
            return {**row, "failed": reason, "log": said[-8000:]}
        figures = json.loads(file.read_text())
    figures["about"]["command"] = " ".join(["python", *sys.argv])
    return {**row, **figures}


def end(process: subprocess.Popen) -> None:
    """End a launcher and all that it started: left behind, they would hold the GPUs."""
    launched = psutil.Process(process.pid)
    everyone = [launched, *launched.children(recursive=True)]
    for member in everyone:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(everyone, timeout=10)
    process.wait()


def table(done: list[Row]) -> str:
    head = ["model", "K", "B x T", "recompute", "mode", "engine", "GPUs", "GiB/GPU", "ms/step", "agent-tok/s"]
    lines = [[*head, "useful TFLOP/s a GPU", "of matmul", "over plain", "scaling", "how"], ["---"] * 15]
    for row in with_ratios(done):
        line = [row["model"], str(row["K"]), f"{row['B']} x {row['T']}"]
        line += ["" if row["recompute"] == "none" else row["recompute"], row["mode"]]
        line += [{"plain": "plain" if row["processes"] == 1 else "DDP"}.get(row["engine"], "ZeRO-2")]
        line += [str(row["processes"])]
        if "failed" in row:
            line += [row["failed"], *[""] * 7]
        else:
            peak, share = row["peak_gib"], row["useful_tflops_per_gpu"] / row["about"]["matmul_tflops"]
            line += ["" if peak is None else f"{peak:.1f}", f"{row['ms_per_step']:.1f}"]
            line += [f"{row['agent_tokens_per_second']:,.0f}", f"{row['useful_tflops_per_gpu']:.1f}", f"{share:.0%}"]
            line += ["" if row[name] is None else f"{row[name]:{how}}" for name, how in RATIOS]
            line.append(row["execution"])
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(out: Path, done: list[Row]) -> None:
    abouts = [row["about"] for row in done if "about" in row]
    kinds = {tuple(sorted((k, str(v)) for k, v in about.items() if k != "matmul_tflops")): about for about in abouts}
    described = "\n".join(
        f"- {about['device']}, driver {about['driver']}, {about['dtype']}; torch {about['torch']}, transformers "
        f"{about['transformers']}, deepspeed {about['deepspeed']}; commit {about['commit']}: `{about['command']}`"
        for about in kinds.values()
    )
    text = f"""# Time and memory of a step

{table(done)}

{chr(10).join(f"- {line}" for line in checks(done))}

Weights and token ids are random, in the real shapes; every token is a target; rank {done[0]["rank"]} on all seven
linears. A step is forward, objective with the sliced distance, backward, clipping and AdamW, by the product's engine.
The median of the slowest process's steps; the memory that the allocator of the fullest one reserved. Useful work is
counted as in `modes.py`, beside a large matrix product timed in the same process. Scaling: the time of one process
over that of several with as many rows each.

{described}
"""
    whole = {"rows": done, "checks": [verdict._asdict() for verdict in checks(done)]}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("table.md", text), ("table.json", json.dumps(whole, indent=1) + "\n")):
        (out / f"{name}.new").write_text(content)
        (out / f"{name}.new").replace(out / name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    own = [n for n in (1, 2, 4) if n <= torch.cuda.device_count()] if on_gpu else [1, 2]
    parser.add_argument("--rows", nargs="+", metavar="WORDS", help="rows whose name has all words of one of these")
    parser.add_argument("--processes", nargs="+", type=int, default=own, help="numbers of GPUs")
    parser.add_argument("--attention", default="auto", help="as the key attn_implementation")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=float, default=200, help="seconds for one row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all: end then, whatever is under way")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and end")
    # Figures of a CPU say nothing of the product's speed: they go where nobody takes them for the table.
    parser.add_argument("--out", type=Path, default=Path(__file__).parent if on_gpu else ROOT / "runs" / "table")
    return parser.parse_args()


class Progress:
    """The rows that are done, on disk after each; several lanes add to it."""

    def __init__(self, out: Path):
        self.out, self._lock, file = out, Lock(), out / "table.json"
        self.done: list[Row] = json.loads(file.read_text())["rows"] if file.exists() else []

    def of(self, row: Row) -> Row | None:
        return next((known for known in self.done if key_of(known) == key_of(row)), None)

    def is_measured(self, row: Row) -> bool:
        known = self.of(row)
        return known is not None and "failed" not in known

    def add(self, row: Row) -> None:
        with self._lock:
            self.done = [known for known in self.done if key_of(known) != key_of(row)] + [row]
            self.done.sort(key=lambda known: [str(value).rjust(9) for value in key_of(known)])
            write(self.out, self.done)
            print(table([row]).splitlines()[-1], flush=True)


def visible_gpus() -> list[str]:
    """The names by which a process of this one's is given some of its GPUs."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def waves(waiting: Sequence[Row], gpus: Sequence[str]) -> Iterator[list[tuple[list[Row], Sequence[str]]]]:
    """Rows of equal processes that follow each other, in lanes side by side, each with GPUs of its own.

    A model keeps to its lane: figures that are compared with each other are of the same GPU.
    """
    models = sorted({row["model"] for row in waiting})
    for processes, group in groupby(waiting, key=lambda row: row["processes"]):
        num_lanes = max(1, len(gpus) // processes)
        lanes: list[list[Row]] = [[] for _ in range(num_lanes)]
        for row in group:
            lanes[models.index(row["model"]) % num_lanes].append(row)
        yield [(lane, gpus[number * processes : (number + 1) * processes]) for number, lane in enumerate(lanes)]


def measure_all(waiting: Sequence[Row], progress: Progress, limit: float, deadline: float) -> None:
    """Wave after wave, until the deadline; rows that it cuts off are left out."""

    def run(lane: list[Row], gpus: Sequence[str]) -> None:
        for row in lane:
            left = deadline - time.monotonic()
            if left < SHORTEST_ROW_S:
                return
            new = measured(row, gpus, min(limit, left))
            if new is None and left < limit:
                return  # no fault of the row's
            progress.add(new or {**row, "failed": f"took more than {limit:.0f} s"})

    for wave in waves(waiting, visible_gpus()):
        with ThreadPoolExecutor(len(wave)) as pool:
            list(pool.map(run, *zip(*wave, strict=True)))


def main() -> None:
    options = arguments()
    progress = Progress(options.out)
    wanted = rows(options, ON_GPU if torch.cuda.is_available() else ON_CPU)
    if not options.list:
        waiting = [row for row in wanted if not progress.is_measured(row)]
        measure_all(waiting, progress, options.limit, timing.deadline(options.seconds))
    for row in wanted:
        known = progress.of(row)
        print(name_of(row) + (": not measured" if known is None else ": failed" if "failed" in known else ": measured"))
    if progress.done and not options.list:
        print("\n".join(["", table(progress.done), "", *map(str, checks(progress.done))]))


if __name__ == "__main__":
    main()
