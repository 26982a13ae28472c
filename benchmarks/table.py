"""Memory and time of a step: models x modes x engines x numbers of GPUs, each row in processes of its own.

    python benchmarks/table.py --seconds 540                      # what matters most first
    python benchmarks/table.py --rows "gemma-2-2b fused" "gemma-2-9b zero2 x1"

writes table.md and table.json to --out after every row. A row that table.json holds is not measured again, so
that the table can be made in pieces; a failed row is. `--list` prints the names of the rows in their order.
Where there are more GPUs than a row needs, rows of different models run side by side. What counts as useful
work: modes.py.
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

import psutil
import timing
import torch
from case import Case
from results import Results, Row, gib_cell, markdown_table, recompute_cell
from verdicts import ENGINES, checks, key_of, name_of, with_ratios

from chorus.config.execution import MODES

ROOT = Path(__file__).parents[1]
# model, K, B, T, recompute
ON_GPU = (
    ("gemma-2-2b", 2, 4, 512, "none"),
    ("gemma-2-2b", 4, 4, 512, "none"),
    ("gemma-2-9b", 4, 4, 1024, "full"),
    ("gemma-2-9b", 8, 4, 1024, "full"),
)
ON_CPU = (("tiny", 2, 2, 16, "none"),)
FIRST = (  # the rows that the checks need, most important first; then all others
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
SHORTEST_ROW_S = 30  # no row starts with less time left


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
    return sorted(
        wanted, key=lambda row: next((i for i, name in enumerate(FIRST) if is_named(row, name)), len(FIRST))
    )


def is_named(row: Row, words: str) -> bool:
    return set(words.split()) <= set(name_of(row).split())


def launcher(row: Row) -> list[str]:
    """As train.py is launched; by module, because some machines
    lack the commands beside their interpreter."""
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    processes = ["--num_processes", str(row["processes"])]
    if row["engine"] == "zero2":
        return [
            *accelerate,
            "--config_file",
            "accelerate_config.yaml",
            "--main_process_port",
            "0",
            *processes,
        ]
    if torch.cuda.is_available():
        several = ["--multi_gpu", "--main_process_port", "0"] if row["processes"] > 1 else []
        return [*accelerate, *several, *processes]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={row['processes']}",
    ]


def measured(row: Row, gpus: Sequence[str], seconds: float) -> Row | None:
    """The row with its figures, or with `failed`, the reason.
    None: they did not come within these seconds."""
    with TemporaryDirectory() as folder:
        file, log = Path(folder) / "figures.json", Path(folder) / "log"
        command = [*launcher(row), str(Path(__file__).with_name("measure.py")), json.dumps(row), str(file)]
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
            fault = re.search(
                r"^(?:\[rank\d+\]: *)?((?:error|[\w.]*(?:Error|Exception)): .+)", said, re.MULTILINE
            )
            reason = fault.group(1) if fault else f"code {code}: {said.strip()[-150:]}"
            reason = " ".join(reason[:200].replace("|", "/").split())
            return {**row, "failed": reason, "log": said[-8000:]}
        figures = json.loads(file.read_text())
    return {**row, **figures, "about": figures["about"] | {"command": " ".join(["python", *sys.argv])}}


def end(process: subprocess.Popen) -> None:
    """End a launcher and everything it started, which would otherwise keep the GPUs."""
    launched = psutil.Process(process.pid)
    everyone = [launched, *launched.children(recursive=True)]
    for member in everyone:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(everyone, timeout=10)
    process.wait()


def table(rows: Sequence[Row]) -> str:
    head = ["model", "K", "B x T", "recompute", "mode", "engine", "GPUs", "GiB/GPU", "ms/step", "agent-tok/s"]
    lines = [[*head, "useful TFLOP/s a GPU", "of matmul", "over plain", "scaling", "how"]]
    for row in with_ratios(rows):
        engine = {"plain": "plain" if row["processes"] == 1 else "DDP"}.get(row["engine"], "ZeRO-2")
        shape = [row["model"], str(row["K"]), f"{row['B']} x {row['T']}", recompute_cell(row)]
        line = [*shape, row["mode"], engine, str(row["processes"])]
        if "failed" in row:
            line += [row["failed"], *[""] * 7]
        else:
            line += [gib_cell(row), f"{row['ms_per_step']:.1f}", f"{row['agent_tokens_per_second']:,.0f}"]
            line += [f"{row['useful_tflops']:.1f}", f"{row['share_of_matmul']:.0%}"]
            line += ["" if row[name] is None else f"{row[name]:{form}}" for name, form in RATIOS]
            line.append(", ".join(filter(None, [row["execution"], row["notes"]])))
        lines.append(line)
    return markdown_table(lines)


def page(rows: Sequence[Row]) -> str:
    abouts = {tuple(row["about"].items()): row["about"] for row in rows if "about" in row}
    described = "\n".join(
        f"- {about['device']}, driver {about['driver']}, {about['dtype']}; torch {about['torch']}, "
        f"transformers {about['transformers']}, deepspeed {about['deepspeed']}; commit {about['commit']}: "
        f"`{about['command']}`"
        for about in abouts.values()
    )
    return f"""# Time and memory of a step

{table(rows)}

{chr(10).join(f"- {line}" for line in checks(rows))}

Weights and token ids are random, in the real shapes; every token is a target; rank {rows[0]["rank"]} on all seven
linears. A step is forward, objective with the sliced distance, backward, clipping and AdamW, by the product's engine.
The median of the slowest process's steps; the memory that the allocator of the fullest one reserved. Useful work is
counted as in `modes.py`, beside a large matrix product timed in the same process. Scaling: the time of one process
over that of several with as many rows each.

{described}
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    own = [n for n in (1, 2, 4) if n <= torch.cuda.device_count()] if on_gpu else [1, 2]
    parser.add_argument(
        "--rows", nargs="+", metavar="WORDS", help="rows whose name has all words of one of these"
    )
    parser.add_argument("--processes", nargs="+", type=int, default=own, help="numbers of GPUs")
    parser.add_argument("--attention", default="auto", help="as the key attn_implementation")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=float, default=200, help="seconds for one row")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="end after this time, even within a row"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows and end")
    # Figures of a CPU say nothing about the speed on a GPU: they do not go beside the table.
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent if on_gpu else ROOT / "runs" / "table"
    )
    return parser.parse_args()


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
        yield [
            (lane, gpus[number * processes : (number + 1) * processes]) for number, lane in enumerate(lanes)
        ]


def in_order(row: Row) -> list[str]:
    return [str(value).rjust(9) for value in key_of(row)]


def measure_all(waiting: Sequence[Row], results: Results, limit: float, deadline: float) -> None:
    """Wave after wave, until the deadline; rows that it cuts off are left out."""

    def run(lane: list[Row], gpus: Sequence[str]) -> None:
        for row in lane:
            left = deadline - time.monotonic()
            if left < SHORTEST_ROW_S:
                return
            new = measured(row, gpus, min(limit, left))
            if new is None and left < limit:
                return  # cut off by the deadline, which is not the row's fault
            results.add(new or {**row, "failed": f"took more than {limit:.0f} s"}, in_order)
            print(name_of(row), "is done", flush=True)

    for wave in waves(waiting, visible_gpus()):
        with ThreadPoolExecutor(len(wave)) as pool:
            list(pool.map(run, *zip(*wave, strict=True)))


def main() -> None:
    options = arguments()
    results = Results(options.out, "table", key_of, page)
    wanted = rows(options, ON_GPU if torch.cuda.is_available() else ON_CPU)
    if not options.list:
        waiting = [row for row in wanted if not results.is_measured(row)]
        measure_all(waiting, results, options.limit, timing.deadline(options.seconds))
    for row in wanted:
        known = results.of(row)
        print(
            name_of(row)
            + (": not measured" if known is None else ": failed" if "failed" in known else ": measured")
        )
    if results.rows and not options.list:
        print("\n".join(["", table(results.rows), "", *map(str, checks(results.rows))]))


if __name__ == "__main__":
    main()
