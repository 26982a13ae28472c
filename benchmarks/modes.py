"""Time and memory of one optimiser step in every mode, beside what switching adapters costs with stock PEFT.

    python benchmarks/modes.py --model gemma-2-2b --shapes 4x1x512 4x4x512 --modes fused switching

prints a table and writes modes.md and modes.json to --out. A shape is K x B x T. Weights and token ids are random,
every token is a target. One step is forward, backward, clipping and AdamW. What counts as useful work: chorus.flops.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from baselines import Switching, fuse_norms
from conditions import conditions
from shapes import random_base
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from chorus.adapters import LoraShape, TensorId
from chorus.agents import Execution, NoiseRates, build_agents, copy_sharing_storage
from chorus.data import Batch, Sample, collate
from chorus.engine import adamw
from chorus.flops import work_of
from chorus.objective import SwdSettings, objective

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODES = ("fused", "sequential", "parallel", "switching", "tuned switching")
LAMBDA_SW = 0.01


class Case(NamedTuple):
    """One row of the table, before it is measured."""

    mode: str
    K: int
    B: int
    T: int
    checkpointing: bool
    compiled: bool
    recorded: bool


class Step(NamedTuple):
    """What is timed: `backward` gives every agent its gradient and returns loss_K; then the optimiser steps."""

    backward: Callable[[Batch], Tensor]
    parameters: list[Tensor]
    notes: str


def random_batch(case: Case, vocabulary: int, device: torch.device) -> Batch:
    """B rows of T positions, each a target; 16 points a row for the sliced distance."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, vocabulary, (case.B, case.T + 1), generator=generator)
    samples = [Sample(ids_T, torch.ones(case.T + 1, dtype=torch.bool)) for ids_T in ids_BT]
    return collate(samples, pad_id=0, points_per_row=16).to(device)


def chorus_step(case: Case, base: PreTrainedModel, shape: LoraShape) -> tuple[Step, dict[TensorId, Any]]:
    agents = build_agents(
        case.mode,  # pyright: ignore[reportArgumentType]
        base,
        case.K,
        shape,
        NoiseRates(0, 0, 0),
        Execution(case.checkpointing, None, case.compiled, case.recorded),
    )
    step = iter(range(10**9))

    def backward(batch: Batch) -> Tensor:
        now = next(step)
        output = agents(batch, step=now)
        part = objective(
            *output,
            batch,
            num_targets=len(batch.target_rows_N),
            num_micro_batches=1,
            lambda_sw=LAMBDA_SW if case.K > 1 else 0.0,
            swd=SwdSettings(64, "tokens", 0),
            step=now,
            rows_per_process=case.B,
            gather=lambda own: own,
        )
        part.share.backward()
        return part.nll_K / len(batch.target_rows_N)

    tensors = agents.adapter_tensors()
    return Step(backward, list(tensors.values()), f"{base.config._attn_implementation} attention"), tensors


def prepare(case: Case, base: PreTrainedModel, rank: int) -> Step:
    """The step of a case, on modules of its own over the base's storage, from the same adapters in every mode."""
    shape = LoraShape(rank, 2.0 * rank, TARGETS, random_init=True, seed=0)
    own = copy_sharing_storage(base)
    if "switching" not in case.mode:
        return chorus_step(case, own, shape)[0]
    _, initial = chorus_step(
        case._replace(mode="sequential", compiled=False, recorded=False), copy_sharing_storage(base), shape
    )
    tuned = case.mode == "tuned switching"
    notes = [f"{base.config._attn_implementation} attention"]
    if tuned:
        own.set_attn_implementation("flex_attention" if base.device.type == "cuda" else "eager")
        notes = [f"{own.config._attn_implementation} attention", fuse_norms(own)]
    switching = Switching(own, shape, {identity: tensor.detach() for identity, tensor in initial.items()}, tuned)
    return Step(switching.backward, switching.parameters, ", ".join(notes))


def measure(case: Case, base: PreTrainedModel, rank: int, steps: int, profile_to: Path | None) -> dict[str, Any]:
    """Median ms of a step after warm-up, and the peak memory of those steps."""
    batch = random_batch(case, base.config.vocab_size, base.device)
    step = prepare(case, base, rank)
    optimizer = adamw(step.parameters, lr=1e-5, weight_decay=0.01)

    def run() -> Tensor:
        loss_K = step.backward(batch)
        torch.nn.utils.clip_grad_norm_(step.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss_K

    started = time.perf_counter()
    first_loss_K = run().tolist()
    warm_up_s = time.perf_counter() - started
    for _ in range(2):
        run()
    on_gpu = base.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = list(timed(run, steps, on_gpu))
    if profile_to is not None:
        write_profile(run, profile_to / f"profile-{'-'.join(map(str, case)).replace(' ', '-')}.txt", on_gpu)
    return {
        "ms_per_step": median(times),
        "ms_min": min(times),
        "ms_max": max(times),
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "warm_up_s": warm_up_s,
        "first_loss": first_loss_K,
        "notes": step.notes,
    }


def timed(run: Callable[[], object], steps: int, on_gpu: bool) -> Iterator[float]:
    """Milliseconds from the start of one step to the start of the next: the host may not fall behind unseen."""
    if not on_gpu:
        for _ in range(steps):
            started = time.perf_counter()
            run()
            yield 1000 * (time.perf_counter() - started)
        return
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    for before, after in pairwise(marks):
        yield before.elapsed_time(after)


def write_profile(run: Callable[[], object], path: Path, on_gpu: bool) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    averages = profiler.key_averages()
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    by_device = averages.table(sort_by=key, row_limit=60, max_name_column_width=90)
    path.write_text(f"{by_device}\n{averages.table(sort_by='self_cpu_time_total', row_limit=40)}\n")


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The yardstick: a square matrix product on random data, timed here and now."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    times = list(timed(lambda: a @ b, 20, device.type == "cuda"))
    return 2 * size**3 / median(times) / 1e9


def check_equal_losses(base: PreTrainedModel, modes: list[str], rank: int, compiled: bool, recorded: bool) -> str:
    """Every mode's loss of every agent on the same rows and adapters, before anything is timed."""
    tolerance = 1e-4 if base.dtype == torch.float32 else 1e-2
    losses: dict[str, Tensor] = {}
    if len(modes) == 1:
        return "nothing to compare, one mode"
    for mode in modes:
        case = Case(mode, 2, 2, 128, False, compiled, recorded)
        losses[mode] = prepare(case, base, rank).backward(random_batch(case, base.config.vocab_size, base.device))
    expected = losses[modes[0]]
    worst = max(float(((loss_K - expected) / expected).abs().max()) for loss_K in losses.values())
    if not worst <= tolerance:
        raise SystemExit(f"the modes disagree: relative difference {worst:.1e} of {losses}")
    return f"losses of {', '.join(modes)} agree to {worst:.1e}"


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "model",
        "mode",
        "K",
        "B x T",
        "recompute",
        "compiled",
        "graphs",
        "ms/step",
        "agent-tok/s",
        "useful TFLOP/s",
    ]
    lines = [[*head, "of matmul", "peak GiB", "notes"], ["---"] * 13]
    for row in rows:
        lines.append(
            [
                row["model"],
                row["mode"],
                str(row["K"]),
                f"{row['B']} x {row['T']}",
                "yes" if row["checkpointing"] else "",
                "yes" if row["compiled"] else "",
                "yes" if row["recorded"] else "",
                f"{row['ms_per_step']:.1f}",
                f"{row['agent_tokens_per_second']:,.0f}",
                f"{row['useful_tflops']:.1f}",
                f"{row['share_of_matmul']:.0%}",
                "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
                row["notes"],
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(out: Path, rows: list[dict[str, Any]], about: dict[str, Any], equality: str) -> None:
    text = f"""# Modes

{about["device"]}, {about["dtype"]}; torch {about["torch"]}, transformers {about["transformers"]}; commit \
{about["commit"]}; a large matrix product runs at {about["matmul_tflops"]:.1f} TFLOP/s. Before timing: {equality}.

`{about["command"]}`

{table(rows)}

Counted for each agent-token: 4 FLOP for each weight of body and head, and causal attention; recomputation and the
adapters' own products are not useful work. Median of the steps after warm-up. Peak memory of the same steps is what the
allocator reserved, the graphs' own memory included.
"""
    out.mkdir(parents=True, exist_ok=True)
    (out / "modes.md").write_text(text)
    (out / "modes.json").write_text(json.dumps({"about": about, "equality": equality, "rows": rows}, indent=1) + "\n")
    print(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", nargs="+", default=["gemma-2-2b" if on_gpu else "tiny"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--shapes", nargs="+", metavar="KxBxT", default=["4x1x512", "4x4x512"] if on_gpu else ["2x2x16"]
    )
    parser.add_argument("--checkpointing", choices=["no", "yes", "both"], default="no", help="for Chorus's own modes")
    parser.add_argument("--compile", choices=["no", "yes", "both"], default="yes" if on_gpu else "no")
    parser.add_argument("--graphs", choices=["no", "yes", "both"], default="yes" if on_gpu else "no")
    parser.add_argument("--attention", default="eager", help="of Chorus's own modes and of switching")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="write a profiler table of a step of each row")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    return parser.parse_args()


def cases(options: argparse.Namespace) -> Iterator[Case]:
    choices = {"no": [False], "yes": [True], "both": [False, True]}
    for shape in options.shapes:
        K, B, T = map(int, shape.split("x"))
        for mode in options.modes:
            if "switching" in mode:
                yield Case(mode, K, B, T, checkpointing=mode == "switching", compiled=False, recorded=False)
                continue
            for checkpointing in choices[options.checkpointing]:
                for compiled in choices[options.compile]:
                    for recorded in choices[options.graphs]:
                        yield Case(mode, K, B, T, checkpointing, compiled, recorded)


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    about, rows, equality = conditions(device, dtype, matmul_tflops(device, dtype)), [], ""
    for name in options.model:
        base = random_base(name, device, dtype, options.attention)
        work = work_of(base)
        equality = check_equal_losses(
            base, options.modes, options.rank, options.compile != "no", options.graphs != "no"
        )
        print(name, equality, flush=True)
        for case in cases(options):
            torch._dynamo.reset()
            measured = measure(case, base, options.rank, options.steps, options.out if options.profile else None)
            seconds = measured["ms_per_step"] / 1000
            useful = work.useful_flops(case.K * case.B, case.T, case.K * case.B * case.T) / seconds / 1e12
            measured |= {
                "agent_tokens_per_second": case.K * case.B * case.T / seconds,
                "useful_tflops": useful,
                "share_of_matmul": useful / about["matmul_tflops"],
            }
            rows.append({"model": name, **case._asdict(), **measured})
            print(table(rows[-1:]).splitlines()[-1], f"first step {measured['warm_up_s']:.0f} s", flush=True)
        del base
    write(options.out, rows, about, equality)


if __name__ == "__main__":
    main()
