"""One row of table.py, in the processes that a launcher started: the product's own agents, engine and objective.

    accelerate launch [...] benchmarks/row.py '{"model": "tiny", "K": 2, ...}' FILE

The first process writes the figures to FILE. Weights and token ids are random, alike on every process and in every row.
"""

import json
import sys
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import gather_object
from conditions import conditions
from measure import LAMBDA_SW, TARGETS, Case, matmul_tflops, random_batch, timed
from shapes import random_base

from chorus.adapters import lora_shape
from chorus.agents import NoiseRates, build_agents, decide_execution
from chorus.config import Config
from chorus.engine import DTYPES, decide_precision, make_accelerator, start_engine, zero_stage
from chorus.errors import input_errors_end_the_program
from chorus.flops import work_of
from chorus.objective import SwdSettings, objective


def measure(row: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """Time, memory and rates of one configuration; the slowest and the fullest process count. A collective call."""
    K, B, T = row["K"], row["B"], row["T"]
    config = Config(
        num_agents=K,
        parallel_mode=row["mode"],
        gradient_checkpointing="full" if row["recompute"] else "none",
        lora_rank=row["rank"],
        lora_alpha=2.0 * row["rank"],
        lora_target_modules=list(TARGETS),
        initialize_adapters_rand=True,
        lambda_sw=LAMBDA_SW if K > 1 else 0.0,
        batch_size=B,
        max_seq_length=T,
        pad_to_multiple_of=T,  # one length occurs, so compilation and graphs are on where the product has them on
        output_dir=str(output_dir),
    )
    precision = decide_precision(config.mixed_precision)
    accelerator = make_accelerator(config)
    device, on_gpu = accelerator.device, accelerator.device.type == "cuda"
    assert accelerator.num_processes == row["processes"], "the launcher started another number of processes"
    assert zero_stage(accelerator) == (2 if row["engine"] == "zero2" else 0), "another engine than the row's"
    matmul = matmul_tflops(device, DTYPES[precision])

    torch.manual_seed(0)
    base = random_base(row["model"], device, DTYPES[precision], "eager")
    flops = work_of(base).useful_flops(K * B, T, K * B * T) * accelerator.num_processes
    execution = decide_execution(config, device)
    agents = build_agents(config.parallel_mode, base, K, lora_shape(config), NoiseRates(0, 0, 0), execution)
    batch = random_batch(Case(row["model"], row["mode"], K, B, T), base.config.vocab_size, device)
    engine = start_engine(accelerator, agents, config)
    steps, losses = count(), []

    def run() -> None:
        step = next(steps)
        with engine.micro_batch():
            output = engine.module(batch, step=step)
            part = objective(
                *output,
                batch,
                num_targets=len(batch.target_rows_N) * accelerator.num_processes,
                num_micro_batches=1,
                lambda_sw=config.lambda_sw,
                swd=SwdSettings(config.swd_num_projections, config.swd_representation, config.seed),
                step=step,
                rows_per_process=B,
                gather=engine.gather,
            )
            engine.backward(part.share)
        losses.append(part.nll_K)

    for _ in range(3):
        run()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    accelerator.wait_for_everyone()
    times = list(timed(run, row["steps"], on_gpu))
    peak = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None
    of_all = gather_object([(median(times), min(times), max(times), peak)])
    ms, fastest, slowest, peaks = zip(*of_all, strict=True)
    seconds = max(ms) / 1000
    tokens = K * B * T * accelerator.num_processes
    figures = {
        "ms_per_step": max(ms),
        "ms_min": min(fastest),
        "ms_max": max(slowest),
        "peak_gib": max(peaks) if on_gpu else None,
        "agent_tokens_per_second": tokens / seconds,
        "useful_tflops_per_gpu": flops / accelerator.num_processes / seconds / 1e12,
        "first_loss": float(losses[0].mean()) / len(batch.target_rows_N),
        "execution": f"{'compiled' if execution.compiled else 'not compiled'}, "
        + ("graphs" if execution.recorded else "no graphs"),
        "about": conditions(device, DTYPES[precision], matmul),
    }
    accelerator.wait_for_everyone()
    engine.close()
    return figures


if __name__ == "__main__":
    with input_errors_end_the_program():
        file = Path(sys.argv[2])
        figures = measure(json.loads(sys.argv[1]), file.parent)
        file.with_suffix(".new").write_text(json.dumps(figures))
        file.with_suffix(".new").replace(file)
