"""Memory and time of a step: models x modes x engines x meshes x numbers of GPUs.

    python benchmarks/table.py --minutes 8                        # what matters most first
    python benchmarks/table.py --rows "gemma-2-2b fused" "gemma-2-9b zero2 x1"
    python benchmarks/table.py --processes 1 8 --rows K=8 --trace # also what communication is not hidden

writes table.md and table.json to --out after every row. A row that table.json holds is not measured again, so
that the table can be made in pieces; a failed row is. `--list` prints the names of the rows in their order.
Rows that follow each other in the same engine and mesh share a launch. Where there are more GPUs than a row
needs, rows of different models run side by side. What counts as useful work: modes.py.
"""

import argparse
import json
import os
import re
import shlex
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
from results import Results, Row, gib_cell, markdown_table, recompute_cell
from table_rows import ON_CPU, ON_GPU, STRONG_ON_GPU, rows
from verdicts import checks, key_of, name_of, with_ratios

ROOT = Path(__file__).parents[1]


RATIOS = (("over_plain", "+.1%"), ("weak", ".1%"), ("strong", ".2f"))
SHORTEST_ROW_S = 30  # no row starts with less time left


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


def measured(rows: Sequence[Row], gpus: Sequence[str], seconds: float, limit: float) -> Iterator[Row]:
    """The rows, of one launch, with their figures as they come; the one that fails with `failed`, the reason.

    It ends after these seconds, after a row that failed, and where a launch ends early. The rows that are left
    are for another launch.

    Args:
        limit: seconds in which each row must come.
    """
    begun = time.monotonic()
    with TemporaryDirectory() as name, (Path(name) / "log").open("w+") as log:
        command = [*launcher(rows[0]), str(Path(__file__).with_name("measure.py")), json.dumps(rows), name]
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | seen)
        try:
            for place, row in enumerate(rows):
                file, until = Path(name) / f"{place}.json", min(time.monotonic() + limit, begun + seconds)
                while not file.exists() and process.poll() is None and time.monotonic() < until:
                    time.sleep(0.1)
                if file.exists():
                    figures = json.loads(file.read_text())
                    about = figures["about"] | {"command": shlex.join(["python", *sys.argv])}
                    yield {**row, **figures, "about": about}
                    continue
                if process.poll() is not None and (process.returncode != 0 or place == 0):
                    yield {**row, **reason_of(process.returncode, Path(log.name).read_text(errors="replace"))}
                elif process.poll() is None and until < begun + seconds:
                    yield {**row, "failed": f"took more than {limit:.0f} s"}
                return
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, begun + seconds - time.monotonic()))
        finally:
            end(process)


def reason_of(code: int, said: str) -> Row:
    """Why a launch failed: the first error that it names."""
    fault = re.search(r"^(?:\[rank\d+\]: *)?((?:error|[\w.]*(?:Error|Exception)): .+)", said, re.MULTILINE)
    reason = fault.group(1) if fault else f"code {code}: {said.strip()[-150:]}"
    return {"failed": " ".join(reason[:200].replace("|", "/").split()), "log": said[-8000:]}


def end(process: subprocess.Popen) -> None:
    """End a launcher and everything it started, which would otherwise keep the GPUs."""
    if process.poll() is not None:
        return
    launched = psutil.Process(process.pid)
    everyone = [launched, *launched.children(recursive=True)]
    for member in everyone:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(everyone, timeout=10)
    process.wait()


def table(rows: Sequence[Row]) -> str:
    head = ["model", "K", "B x T", "recompute", "mode", "engine", "GPUs", "A", "GiB/GPU", "ms/step"]
    more = [
        "agent-tok/s",
        "useful TFLOP/s a GPU",
        "of matmul",
        "over plain",
        "weak",
        "strong",
        "not hidden ms",
        "how",
    ]
    lines = [[*head, *more]]
    for row in with_ratios(rows):
        engine = {"plain": "plain" if row["processes"] == 1 else "DDP"}.get(row["engine"], "ZeRO-2")
        shape = [row["model"], str(row["K"]), f"{row['B']} x {row['T']}", recompute_cell(row)]
        line = [*shape, row["mode"], engine, str(row["processes"]), str(row["A"])]
        if "failed" in row:
            line += [row["failed"], *[""] * 9]
        else:
            line += [gib_cell(row), f"{row['ms_per_step']:.1f}", f"{row['agent_tokens_per_second']:,.0f}"]
            line += [f"{row['useful_tflops']:.1f}", f"{row['share_of_matmul']:.0%}"]
            line += ["" if row[name] is None else f"{row[name]:{form}}" for name, form in RATIOS]
            trace = row.get("trace")
            line.append(f"{trace['exposed_ms']:.1f}" if trace else "")
            line.append(", ".join(filter(None, [row["execution"], row["notes"]])))
        lines.append(line)
    return markdown_table(lines)


def traces(rows: Sequence[Row]) -> str:
    """A table of what the traced steps were made of; empty without any."""
    names = ("step_ms", "communication_ms", "exposed_ms", "waiting_ms", "idle_ms")
    lines = [["row", "step ms", "NCCL runs", "and nothing computes", "it waits for others", "no kernel runs"]]
    for row in (one for one in rows if one.get("trace")):
        lines.append([name_of(row), *(f"{row['trace'][name]:.2f}" for name in names)])
    return f"\n{markdown_table(lines)}\n" if len(lines) > 1 else ""


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
counted as in `modes.py`, beside a large matrix product timed in the same process. B is the rows of a process. Each
of A processes holds K / A agents, and A of them see the same rows. Weak: the rate of each GPU over that of one alone,
with as many agents times rows on each. Strong: how many times as fast as one GPU with the whole batch. These and the
cost over plain are taken by the large product, because GPUs of one kind differ by some percent. Not hidden:
milliseconds of a step in which NCCL runs and nothing computes, from a trace of it.
{traces(rows)}
{described}
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    own = [n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()] if on_gpu else [1, 2]
    parser.add_argument(
        "--rows", nargs="+", metavar="WORDS", help="rows whose name has all words of one of these"
    )
    parser.add_argument("--processes", nargs="+", type=int, default=own, help="numbers of GPUs")
    parser.add_argument("--attention", default="auto", help="as the key attn_implementation")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=float, default=200, help="seconds for one row")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="end after this time, even within a row"
    )
    parser.add_argument("--trace", action="store_true", help="trace a step of each row: what is not hidden")
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


def launches(lane: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that follow each other and may share processes: of one model and engine, under ZeRO-2 of one mesh, too,
    because DeepSpeed keeps the groups of a process."""

    def key(row: Row) -> tuple:
        return row["model"], row["engine"], row["processes"], row["engine"] == "zero2" and row["A"]

    for _, group in groupby(lane, key=key):
        yield list(group)


def measure_all(waiting: Sequence[Row], results: Results, limit: float, deadline: float) -> None:
    """Wave after wave, until the deadline; rows that it cuts off are left out."""

    def run(lane: list[Row], gpus: Sequence[str]) -> None:
        for group in launches(lane):
            while group:
                left = deadline - time.monotonic()
                if left < SHORTEST_ROW_S:
                    return
                done = 0
                for row in measured(group, gpus, left, limit):
                    results.add(row, in_order)
                    print(name_of(row), "is done", flush=True)
                    done += 1
                if done == 0:
                    return  # cut off by the deadline, which is not the row's fault
                group = group[done:]

    for wave in waves(waiting, visible_gpus()):
        with ThreadPoolExecutor(len(wave)) as pool:
            list(pool.map(run, *zip(*wave, strict=True)))


def main() -> None:
    options = arguments()
    results = Results(options.out, "table", key_of, page)
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory / 2**30
        weak, strong = ([shape for shape in some if shape.gib < room] for some in (ON_GPU, STRONG_ON_GPU))
        wanted = rows(options, weak, strong)
    else:
        wanted = rows(options, ON_CPU)
    if not options.list:
        waiting = [row for row in wanted if not results.is_measured(row)]
        measure_all(waiting, results, options.limit, timing.deadline(60 * options.minutes))
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
