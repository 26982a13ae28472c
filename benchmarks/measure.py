"""One row of the benchmarks' table: a step of one mode, on one base, timed in a process of its own."""

import gc
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from baselines import Switching, fuse_norms
from shapes import config_of, random_base
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from chorus.adapters import LoraShape, TensorId
from chorus.agents import Execution, NoiseRates, build_agents, copy_sharing_storage
from chorus.attention import choose_attention
from chorus.data import Batch, Sample, collate
from chorus.flops import work_of
from chorus.layers import Recompute
from chorus.objective import SwdSettings, objective

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODES = ("fused", "sequential", "parallel", "switching", "tuned switching")
LAMBDA_SW = 0.01
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # of device types
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative, of losses of the same agents in another mode


class Case(NamedTuple):
    """One row of the table, before it is measured.

    Attributes:
        model: of `shapes.SHAPES`, a hub id or a folder.
        recompute, compiled, recorded: as in `agents.Execution`; `switching` has its own.
        mixed: samples of T / 8 to T tokens, in place of T each.
        packing: several samples a row, as `packing: true` lays them.
    """

    model: str
    mode: str
    K: int
    B: int
    T: int
    recompute: Recompute = "none"
    compiled: bool = False
    recorded: bool = False
    mixed: bool = False
    packing: bool = False

    @property
    def name(self) -> str:
        flags = [flag for flag in ("compiled", "recorded", "mixed", "packing") if getattr(self, flag)]
        shape = f"{self.model} {self.mode} {self.K}x{self.B}x{self.T}"
        return " ".join([shape, *([] if self.recompute == "none" else [f"recompute-{self.recompute}"]), *flags])

    @property
    def same_losses(self) -> tuple:
        """Rows that agree in this must agree in their agents' first losses."""
        return self.model, self.K, self.B, self.T, self.mixed


class Step(NamedTuple):
    """What is timed: `backward` gives every agent its gradient and returns loss_K; then the optimiser steps."""

    backward: Callable[[Batch], Tensor]
    parameters: list[Tensor]
    notes: str


def lengths_of(case: Case) -> list[int]:
    """Of B samples; mixed: from T / 8 to T, evenly spread."""
    share_B = torch.linspace(1 / 8, 1, case.B) if case.mixed else torch.ones(case.B)
    return [round(case.T * share) for share in share_B.tolist()]


def random_batch(case: Case, vocabulary: int, device: torch.device) -> Batch:
    """B samples, each of whose positions is a target; 16 points a sample for the sliced distance."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, vocabulary, (case.B, case.T + 1), generator=generator)
    samples = [
        Sample(ids_T[: length + 1], torch.ones(length + 1, dtype=torch.bool))
        for ids_T, length in zip(ids_BT, lengths_of(case), strict=True)
    ]
    packing = (case.T + 1, case.B) if case.packing else None
    return collate(samples, pad_id=0, points_per_row=16, packing=packing).to(device)


def attention_of(case: Case, device: torch.device, dtype: torch.dtype) -> str:
    """What `attn_implementation: auto` takes for this row; the baselines' is fixed by what they stand for."""
    if case.mode == "tuned switching":
        return "flex_attention" if device.type == "cuda" else "eager"  # flex has no backward pass on a CPU
    config = config_of(case.model)
    how = {"length": case.T, "compiled": case.compiled, "packing": case.packing}
    chosen = None if case.mode == "switching" else choose_attention("auto", config, device, dtype, **how)
    return chosen or "eager"


def chorus_step(case: Case, base: PreTrainedModel, shape: LoraShape) -> tuple[Step, dict[TensorId, Any]]:
    agents = build_agents(
        case.mode,  # pyright: ignore[reportArgumentType]
        base,
        case.K,
        shape,
        NoiseRates(0, 0, 0),
        Execution(case.recompute, None, case.compiled, case.recorded),
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
    return Step(backward, list(agents.adapters().values()), f"{base.config._attn_implementation} attention"), tensors


def prepare(case: Case, base: PreTrainedModel, rank: int) -> Step:
    """The step of a case, from the same adapters in every mode."""
    shape = LoraShape(rank, 2.0 * rank, TARGETS, random_init=True, seed=0)
    if "switching" not in case.mode:
        return chorus_step(case, base, shape)[0]
    plain = case._replace(mode="sequential", recompute="none", compiled=False, recorded=False)
    _, initial = chorus_step(plain, copy_sharing_storage(base), shape)
    tuned = case.mode == "tuned switching"
    notes = [f"{base.config._attn_implementation} attention", *([fuse_norms(base)] if tuned else [])]
    switching = Switching(base, shape, {identity: tensor.detach() for identity, tensor in initial.items()}, tuned)
    return Step(switching.backward, switching.parameters, ", ".join(notes))


def measure(case: Case, rank: int, steps: int, expected_loss_K: list[float] | None, profile_to: Path | None) -> dict:
    """One row: median ms of a step after warm-up, the peak memory of those steps, and what follows from them.

    Raises:
        ValueError: an agent's first loss is not the expected one; then nothing is timed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[device.type]
    matmul = matmul_tflops(device, dtype)
    torch.manual_seed(0)  # of the base's weights
    base = random_base(case.model, device, dtype, attention_of(case, device, dtype))
    work, lengths = work_of(base), lengths_of(case)
    batch = random_batch(case, base.config.vocab_size, device)
    step = prepare(case, base, rank)
    is_fused = step.parameters[0].is_cuda or None
    optimizer = torch.optim.AdamW(step.parameters, lr=1e-5, weight_decay=0.01, fused=is_fused)

    def run() -> Tensor:
        loss_K = step.backward(batch)
        torch.nn.utils.clip_grad_norm_(step.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss_K

    started = time.perf_counter()
    first_loss_K = run().tolist()
    warm_up_s = time.perf_counter() - started
    worst = max(abs(own / other - 1) for own, other in zip(first_loss_K, expected_loss_K or first_loss_K, strict=True))
    if not worst <= TOLERANCE[dtype]:
        raise ValueError(f"losses {first_loss_K} differ by {worst:.1e} from {expected_loss_K} of the same agents")
    for _ in range(2):
        run()
    gc.collect()
    gc.freeze()  # as in train.py
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = list(timed(run, steps, on_gpu))
    if profile_to is not None:
        write_profile(run, profile_to / f"profile-{case.name.replace(' ', '-').replace('/', '-')}.txt", on_gpu)
    seconds = median(times) / 1000
    useful = sum(work.useful_flops(case.K, length, case.K * length) for length in lengths) / seconds / 1e12
    return {
        "ms_per_step": 1000 * seconds,
        "ms_min": min(times),
        "ms_max": max(times),
        "agent_tokens_per_second": case.K * sum(lengths) / seconds,
        "useful_tflops": useful,
        "matmul_tflops": matmul,
        "share_of_matmul": useful / matmul,
        "peak_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "warm_up_s": warm_up_s,
        "first_loss": first_loss_K,
        "loss_differs": worst,
        "rows_of_the_batch": list(batch.input_BT.shape),
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
