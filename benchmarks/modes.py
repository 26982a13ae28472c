"""Time and memory of one optimiser step in every mode, and by switching adapters with stock PEFT.

    python benchmarks/modes.py                              # the headline rows: about ten minutes on an H200
    python benchmarks/modes.py --only 4x4x512 --minutes 5   # those of them whose name has this in it
    python benchmarks/modes.py --model gemma-2-2b --shapes 4x1x512 --modes fused switching --recompute none full

prints a table and writes modes.md and modes.json to --out, where a row that is measured again replaces the
earlier one. A shape is K x B x T. Weights and token ids are random, every token is a target. One step is
forward, backward, clipping and AdamW. Every row runs in a process of its own, so that a row that runs out of
memory does not affect the others.
"""

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import timing
import torch
from case import FLAGS, Case
from conditions import conditions
from measure import measure_alone
from results import Results, Row, gib_cell, markdown_table, recompute_cell

from chorus.config.execution import MODES
from chorus.model.kernels.decoder_layers import Recompute
from chorus.training.engine import DTYPES, decide_precision

MEASURED = (*MODES, "switching", "tuned switching")
# A row that takes longer is abandoned: compiling and capturing takes 20 to 60 s, the steps a few.
SLOWEST_ROW_S = 180
SHORTEST_ROW_S = 20  # no row starts with less time left
# What every row's process is forked with: most of its imports' time. A process forked after CUDA was
# initialised cannot use a GPU, so nothing here may touch CUDA as it is imported. peft does: it imports
# bitsandbytes where that is installed, which asks the GPU for its compute capability. Hence not `measure`.
PRELOADED = ("torch", "transformers.modeling_utils")
SAME_RUN = ("device", "dtype", "torch", "commit")  # rows that agree in these may be compared


def headline_rows() -> list[Case]:
    """The rows of docs/modes.md, most important first: a run may be cut short."""
    small, large = "gemma-2-2b", "gemma-2-9b"
    fast = {"compiled": True, "captured": True}
    return [
        Case(small, "fused", 4, 1, 512, **fast),
        Case(small, "switching", 4, 1, 512, "full"),
        Case(small, "fused", 4, 4, 512, **fast),
        Case(small, "tuned switching", 4, 4, 512),
        Case(small, "fused", 16, 1, 512, **fast),
        Case(small, "tuned switching", 4, 1, 512),
        Case(large, "fused", 4, 4, 1024, "full", compiled=True, agents_per_pass=2),  # its aim includes memory
        Case(large, "fused", 4, 4, 1024, "full", compiled=True, agents_per_pass=1),
        Case(
            small, "fused", 4, 1, 512, "full", compiled=True
        ),  # the least memory with all agents in one pass
        Case(small, "fused", 4, 4, 512, "selective", **fast),
        Case(small, "fused", 4, 8, 512, **fast, mixed=True),
        Case(small, "fused", 4, 8, 512, **fast, mixed=True, packing=True),
        Case(large, "fused", 8, 1, 512, "full", compiled=True),
        Case(large, "fused", 4, 4, 1024, "full", compiled=True),
        Case(small, "switching", 4, 4, 512, "full"),
        Case(small, "sequential", 4, 4, 512, **fast),
        Case(small, "parallel", 4, 4, 512, compiled=True),
        Case(large, "fused", 4, 4, 1024, "full", compiled=True, agents_per_pass=1, attention="eager"),
        Case(small, "fused", 4, 8, 1024, "full", compiled=True),
        Case(large, "switching", 4, 1, 512, "full"),
        Case(small, "switching", 4, 1, 512),
        Case(small, "switching", 16, 1, 512, "full"),
    ]


def chosen_rows(options: argparse.Namespace) -> Iterator[Case]:
    flags = {"no": [False], "yes": [True], "both": [False, True]}
    layouts = [(False, False), *([(True, False), (True, True)] if options.mixed else [])]
    ways = list(product(options.recompute, flags[options.compile], flags[options.graphs], layouts))
    for model, shape, mode in product(options.model, options.shapes, options.modes):
        K, B, T = map(int, shape.split("x"))
        if "switching" in mode:
            yield Case(model, mode, K, B, T, "full" if mode == "switching" else "none")
            continue
        for recompute, compiled, captured, (mixed, packing) in ways:
            yield Case(model, mode, K, B, T, recompute, compiled, captured, mixed, packing)


def alone(case: Case, seconds: float, **settings: Any) -> Row | None:
    """`measure_alone` in a process of its own: its row, or `failed`
    with the reason. None: not within these seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    ours, theirs = context.Pipe(duplex=False)
    process, begun = context.Process(target=_measure_into, args=(theirs, case, settings)), time.monotonic()
    process.start()  # the first one waits for the imports
    theirs.close()
    try:
        outcome = ours.recv() if ours.poll(max(0.0, begun + seconds - time.monotonic())) else None
    except EOFError:
        process.join()
        outcome = {"failed": f"its process ended with code {process.exitcode}"}
    process.kill()
    process.join()
    return outcome


def _measure_into(pipe: Connection, case: Case, settings: dict[str, Any]) -> None:
    try:
        pipe.send(measure_alone(case, **settings))
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        whole = traceback.format_exc()[-8000:]
        pipe.send({"failed": f"{type(error).__name__}: {first_line}".replace("|", "/"), "traceback": whole})
        raise


def case_of(row: Row) -> Case:
    return Case(**{field: row[field] for field in Case._fields})


def table(rows: Sequence[Row], newest: dict[str, Any] | None = None) -> str:
    """Rows of another run than `newest` name their device and commit."""
    head = [
        "model",
        "mode",
        "K",
        "B x T",
        "recompute",
        "how",
        "ms/step",
        "agent-tok/s",
        "useful TFLOP/s",
        "of matmul",
    ]
    lines = [[*head, "peak GiB", "notes"]]
    for row in rows:
        lengths = " to ".join(
            f"{length}" for length in ([row["T"] // 8] if row["mixed"] else []) + [row["T"]]
        )
        groups = [f"groups of {row['agents_per_pass']}"] if row["agents_per_pass"] else []
        how = ", ".join([*(flag for flag in FLAGS if row[flag]), *groups])
        start = [
            row["model"],
            row["mode"],
            str(row["K"]),
            f"{row['B']} x {lengths}",
            recompute_cell(row),
            how,
        ]
        if "failed" in row:
            lines.append([*start, "failed", *[""] * 4, row["failed"]])
            continue
        is_of_another_run = newest is not None and not is_same_run(row, newest)
        lines.append(
            [
                *start,
                f"{row['ms_per_step']:.1f}",
                f"{row['agent_tokens_per_second']:,.0f}",
                f"{row['useful_tflops']:.1f}",
                f"{row['share_of_matmul']:.0%}",
                gib_cell(row),
                row["notes"]
                + (f"; {row['about']['device']}, {row['about']['commit']}" if is_of_another_run else ""),
            ]
        )
    return markdown_table(lines)


def is_same_run(row: Row, about: dict[str, Any]) -> bool:
    return all(row["about"][key] == about[key] for key in SAME_RUN)


def equality(rows: Sequence[Row]) -> str:
    """How far first losses of the same agents over the same
    samples differ. A row that differs more is not timed."""
    said = []
    measured = [row for row in rows if "failed" not in row]
    for key in dict.fromkeys(case_of(row).same_losses for row in measured):
        same = [row for row in measured if case_of(row).same_losses == key]
        modes = list(dict.fromkeys(row["mode"] for row in same))
        if len(same) > 1:
            worst = max(row["loss_differs"] for row in same)
            said.append(
                f"losses of {', '.join(modes)} agree to {worst:.1e} ({key[0]} {key[1]}x{key[2]}x{key[3]})"
            )
    return "; ".join(said) or "nothing to compare, one row of each shape"


def page(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if "failed" not in row]
    if not measured:
        return f"# Modes\n\n{table(rows)}\n"
    about, matmuls = measured[-1]["about"], [f"{row['matmul_tflops']:.0f}" for row in measured]
    return f"""# Modes

{about["device"]}, driver {about["driver"]}, {about["dtype"]}; torch {about["torch"]}, transformers \
{about["transformers"]}; commit {about["commit"]}; a large matrix product, timed before each row, runs at \
{min(matmuls, key=float)} to {max(matmuls, key=float)} TFLOP/s. Before timing: {equality(rows)}.

`{about["command"]}`

{table(rows, about)}

Counted for each agent-token: 4 FLOP for each weight of body and head, and causal attention. Recomputation, padding and
the adapters' own products are not useful work. Median of the steps after warm-up. Peak memory of the same steps is what
the allocator reserved, the memory of CUDA graphs included.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="KxBxT", help="rows of your own, in place of the headline rows"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="only rows with one of these in the name"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the rows, and measure none")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="end after this time; the rows left out are named"
    )
    parser.add_argument("--model", nargs="+", default=None)
    parser.add_argument("--modes", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--recompute", nargs="+", choices=get_args(Recompute), default=["none"])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--compile", choices=["no", "yes", "both"], default="yes" if on_gpu else "no")
    parser.add_argument("--graphs", choices=["no", "yes", "both"], default="yes" if on_gpu else "no")
    parser.add_argument(
        "--mixed", action="store_true", help="also samples of T / 8 to T tokens, a row each and packed"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="write a profiler table of a step of each row")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    options.model = options.model or ["gemma-2-2b" if on_gpu else "tiny"]
    options.is_headline = options.shapes is None and on_gpu
    options.shapes = options.shapes or ["2x2x16"]
    return options


def expected_loss(case: Case, rows: Sequence[Row], about: dict[str, Any]) -> list[float] | None:
    """Each agent's first loss by another row of the same machine and commit, if there is one."""
    others = (row for row in rows if case_of(row) != case and case_of(row).same_losses == case.same_losses)
    return next(
        (row["first_loss"] for row in others if "failed" not in row and is_same_run(row, about)), None
    )


def main() -> None:
    options = arguments()
    end = timing.deadline(60 * options.minutes)
    cases = headline_rows() if options.is_headline or options.list else list(chosen_rows(options))
    waiting = [case for case in cases if any(text in case.name for text in options.only)]
    if options.list:
        print(*(case.name for case in waiting), sep="\n")
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = conditions(device, DTYPES[decide_precision("auto")])
    results, failed = Results(options.out, "modes", case_of, page), False
    while waiting:
        case, left = waiting[0], end - time.monotonic()
        if left < SHORTEST_ROW_S:
            break
        profile_to = options.out if options.profile else None
        settings = {"rank": options.rank, "steps": options.steps, "profile_to": profile_to}
        begun, expected = time.monotonic(), expected_loss(case, results.rows, about)
        outcome = alone(case, min(SLOWEST_ROW_S, left), **settings, expected_loss_K=expected)
        if outcome is None and left < SLOWEST_ROW_S:
            break  # cut off by the end, which is not the row's fault: an earlier measurement stays
        row = (
            case._asdict() | (outcome or {"failed": f"took longer than {SLOWEST_ROW_S} s"}) | {"about": about}
        )
        failed = failed or "failed" in row
        results.add(row)
        waiting.pop(0)
        print(f"{time.monotonic() - begun:4.0f} s", table([row]).splitlines()[-1], flush=True)
    print(page(results.rows))
    if waiting:
        print(f"not measured, for want of time: {', '.join(case.name for case in waiting)}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
