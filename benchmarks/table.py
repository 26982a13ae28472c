"""Memory and time of a step: models x modes x engines x numbers of GPUs, each row in processes of its own.

    python benchmarks/table.py --rows "gemma-2-2b fused" "gemma-2-9b zero2 x1" --seconds 540

writes table.md and table.json to --out. A row that table.json has is not measured again, so that the table can be made
in pieces; one that failed is. Names of the rows: --list. What counts as useful work: modes.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
MODES = ("sequential", "parallel", "fused")
ENGINES = ("plain", "zero2")
KEY = ("model", "K", "B", "T", "rank", "recompute", "mode", "engine", "processes")
# model, K, B, T, recompute
ON_GPU = (("gemma-2-2b", 2, 4, 512, False), ("gemma-2-9b", 4, 4, 1024, True), ("gemma-2-9b", 8, 4, 1024, True))
ON_CPU = (("tiny", 2, 2, 16, False),)
RATIOS = (("over_plain", "+.1%"), ("scaling", ".0%"))
AT_MOST_OVER_PLAIN = 0.05  # what ZeRO-2 may cost on one GPU

# What the project was first described with, simulated: GB a GPU and seconds a step, of no named GPU or batch.
CLAIMS = {
    ("gemma-2-2b", 2, "sequential", "plain"): (12, 0.8),
    ("gemma-2-2b", 2, "parallel", "plain"): (12, 0.7),
    ("gemma-2-9b", 4, "sequential", "zero2"): (35, 3.2),
    ("gemma-2-9b", 4, "parallel", "zero2"): (35, 2.8),
}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows that the options ask for, the smallest numbers of processes first."""
    for processes in options.processes:
        for model, K, B, T, recompute in ON_GPU if torch.cuda.is_available() else ON_CPU:
            for engine in ENGINES:
                for mode in MODES:
                    values = (model, K, B, T, options.rank, recompute, mode, engine, processes)
                    row = dict(zip(KEY, values, strict=True)) | {"steps": options.steps}
                    words = name_of(row).split()
                    if not options.rows or any(set(wanted.split()) <= set(words) for wanted in options.rows):
                        yield row


def name_of(row: dict[str, Any]) -> str:
    return f"{row['model']} K={row['K']} {row['B']}x{row['T']} {row['mode']} {row['engine']} x{row['processes']}"


def launcher(row: dict[str, Any]) -> list[str]:
    """As the README launches train.py."""
    processes = ["--num_processes", str(row["processes"])]
    if row["engine"] == "zero2":
        accelerate = ["launch", "--config_file", "accelerate_config.yaml", "--main_process_port", "0"]
        return [str(BIN / "accelerate"), *accelerate, *processes]
    if torch.cuda.is_available():
        several = ["--multi_gpu", "--main_process_port", "0"] if row["processes"] > 1 else []
        return [str(BIN / "accelerate"), "launch", *several, *processes]
    return [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={row['processes']}"]


def measured(row: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The row with its figures, or with `failed`: why it has none."""
    with TemporaryDirectory() as folder:
        file, log = Path(folder) / "figures.json", Path(folder) / "log"
        command = [*launcher(row), str(Path(__file__).with_name("row.py")), json.dumps(row), str(file)]
        with log.open("w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher passes it on; killed, it would leave its processes on the GPUs
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return {**row, "failed": f"took more than {seconds:.0f} s"}
        if code != 0 or not file.exists():
            said = log.read_text(errors="replace")
            faults = [line for line in said.splitlines() if "Error" in line or line.startswith("error: ")]
            return {**row, "failed": faults[0].strip()[:200] if faults else said[-200:]}
        figures = json.loads(file.read_text())
    figures["about"]["command"] = " ".join(["python", *sys.argv])
    return {**row, **figures}


def with_ratios(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its cost over the plain engine and its efficiency over one process, where those are measured."""
    ms = {tuple(row[name] for name in KEY): row["ms_per_step"] for row in done if "failed" not in row}
    result = []
    for row in done:
        key, own = tuple(row[name] for name in KEY), row.get("ms_per_step")
        plain = ms.get((*key[:-2], "plain", key[-1]))
        alone = ms.get((*key[:-1], 1))  # as many rows on each process: time, too, should be equal
        result.append(
            {
                **row,
                "over_plain": own / plain - 1 if own and plain and row["engine"] == "zero2" else None,
                "scaling": alone / own if own and alone and row["processes"] > 1 else None,
            }
        )
    return result


def table(done: list[dict[str, Any]]) -> str:
    head = ["model", "K", "B x T", "recompute", "mode", "engine", "GPUs", "GiB/GPU", "ms/step", "agent-tok/s"]
    lines = [[*head, "useful TFLOP/s a GPU", "of matmul", "over plain", "scaling"], ["---"] * 14]
    for row in with_ratios(done):
        line = [row["model"], str(row["K"]), f"{row['B']} x {row['T']}", "yes" if row["recompute"] else ""]
        line += [row["mode"], {"plain": "plain" if row["processes"] == 1 else "DDP"}.get(row["engine"], "ZeRO-2")]
        line += [str(row["processes"])]
        if "failed" in row:
            line += [row["failed"], *[""] * 6]
        else:
            peak, share = row["peak_gib"], row["useful_tflops_per_gpu"] / row["about"]["matmul_tflops"]
            line += ["" if peak is None else f"{peak:.1f}", f"{row['ms_per_step']:.1f}"]
            line += [f"{row['agent_tokens_per_second']:,.0f}", f"{row['useful_tflops_per_gpu']:.1f}", f"{share:.0%}"]
            line += ["" if row[name] is None else f"{row[name]:{how}}" for name, how in RATIOS]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def checks(done: list[dict[str, Any]]) -> list[str]:
    """What the rows say: of equal losses, of ZeRO-2's cost on one process, of the first description's claims."""
    done = [row for row in with_ratios(done) if "failed" not in row]
    said, losses = [], {}
    for row in done:
        losses.setdefault((row["model"], row["K"], row["B"], row["T"]), []).append(row["first_loss"])
    for shape, values in losses.items():
        said.append(f"{shape}: the first losses of {len(values)} rows agree to {max(values) / min(values) - 1:.1e}")
    costs = [(row["over_plain"], name_of(row)) for row in done if row["over_plain"] is not None]
    for cost, name in sorted(pair for pair in costs if pair[1].endswith(" x1"))[-1:]:
        verdict = "reached" if cost <= AT_MOST_OVER_PLAIN else "missed"
        said.append(
            f"ZeRO-2 over plain on one process: {cost:+.1%} ({name}); at most {AT_MOST_OVER_PLAIN:+.0%}: {verdict}"
        )
    for row in done:
        claim = CLAIMS.get((row["model"], row["K"], row["mode"], row["engine"]))
        if claim is None or row["peak_gib"] is None or row["processes"] > 1:
            continue
        gb, seconds = row["peak_gib"] * 2**30 / 1e9, row["ms_per_step"] / 1000
        said.append(
            f"first described: {name_of(row)}: {claim[0]} GB, {claim[1]} s; measured: {gb:.1f} GB, {seconds:.2f} s"
        )
    return said


def write(out: Path, done: list[dict[str, Any]]) -> None:
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
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("table.md", text), ("table.json", json.dumps({"rows": done}, indent=1) + "\n")):
        (out / f"{name}.new").write_text(content)
        (out / f"{name}.new").replace(out / name)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    own = [n for n in (1, 2, 4) if n <= torch.cuda.device_count()] if on_gpu else [1, 2]
    parser.add_argument("--rows", nargs="+", metavar="WORDS", help="rows whose name has all words of one of these")
    parser.add_argument("--processes", nargs="+", type=int, default=own, help="numbers of GPUs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all: start no row later, end the last")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and end")
    # Figures of a CPU say nothing of the product's speed: they go where nobody takes them for the table.
    parser.add_argument("--out", type=Path, default=Path(__file__).parent if on_gpu else ROOT / "runs" / "table")
    return parser.parse_args()


def main() -> None:
    options, started = arguments(), time.monotonic()
    file = options.out / "table.json"
    done: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    for row in rows(options):
        key = [row[name] for name in KEY]
        old = next((known for known in done if [known[name] for name in KEY] == key), None)
        left = options.seconds - (time.monotonic() - started)
        if options.list or (old is not None and "failed" not in old) or left <= 0:
            state = "" if old is None else ": failed" if "failed" in old else ": measured"
            print(name_of(row) + state, flush=True)
            continue
        new = measured(row, min(options.limit, left))
        done = [known for known in done if known is not old] + [new]
        done.sort(key=lambda known: [str(known[name]).rjust(9) for name in KEY])
        write(options.out, done)
        print(table([new]).splitlines()[-1], flush=True)
    if done and not options.list:
        print("\n".join(["", table(done), "", *checks(done)]))


if __name__ == "__main__":
    main()
