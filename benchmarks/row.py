"""One row of table.py, in the processes that a launcher started: the product's own agents, engine and objective.

    accelerate launch [...] benchmarks/row.py '{"model": "tiny", "K": 2, ...}' FILE

The first process writes the figures to FILE. Weights and token ids are random, alike on every process and in every row.
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from case import Case, attention_of, random_batch, run_config, start, step_of
from conditions import conditions
from shapes import random_base
from timing import matmul_tflops, num_timed, reserved_gib, timed, warm_up

from chorus.errors import input_errors_end_the_program
from chorus.model.execution import decide_execution
from chorus.monitoring.flops import work_of
from chorus.training.engine import DTYPES, decide_precision, make_accelerator, zero_stage


def measure(row: dict[str, Any], output_dir: Path) -> tuple[dict[str, Any], bool]:
    """Time, memory and rates of one row, and whether this is the first process. A collective call.

    The slowest and the fullest process count.
    """
    case = Case(**{field: row[field] for field in Case._fields})
    config = run_config(case, row["rank"], str(output_dir))
    accelerator = accelerator_of(row, config)
    device, dtype = accelerator.device, DTYPES[decide_precision(config.mixed_precision)]
    matmul = matmul_tflops(device, dtype)

    torch.manual_seed(0)
    execution = decide_execution(config, device)
    attention = attention_of(case, device, dtype, execution.compiled is True)
    base = random_base(case.model, device, dtype, attention)
    work = work_of(base)
    batch = random_batch(case, base.config.vocab_size, device)
    engine = start(config, base, execution, accelerator)
    step = step_of(engine, config, batch)
    first_loss_K = step().tolist()
    steps = num_timed(row["steps"], max(gather_object([warm_up(step, device)])))  # as many on every process
    accelerator.wait_for_everyone()
    times = list(timed(step, steps, device))
    figures = {
        **rates(case, work.useful_flops(case.K * case.B, case.T, case.K * case.B * case.T), times, accelerator),
        "steps": steps,
        "first_loss": sum(first_loss_K) / case.K,
        "execution": f"{'compiled' if execution.compiled else 'not compiled'}, "
        f"{'graphs' if execution.captured else 'no graphs'}, {attention} attention",
        "about": conditions(device, dtype, matmul),
    }
    engine.close()
    return figures, accelerator.is_main_process


def accelerator_of(row: dict[str, Any], config: Any) -> Accelerator:
    """The launcher's, which must be what the row names."""
    accelerator = make_accelerator(config)
    assert accelerator.num_processes == row["processes"], "the launcher started another number of processes"
    assert zero_stage(accelerator) == (2 if row["engine"] == "zero2" else 0), "another engine than the row's"
    return accelerator


def rates(case: Case, flops: float, times: list[float], accelerator: Accelerator) -> dict[str, Any]:
    """Of all processes together, from this one's milliseconds and useful FLOP a step. A collective call."""
    ms, fastest, slowest, peaks = zip(
        *gather_object([(median(times), min(times), max(times), reserved_gib(accelerator.device))]), strict=True
    )
    seconds = max(ms) / 1000
    return {
        "ms_per_step": max(ms),
        "ms_min": min(fastest),
        "ms_max": max(slowest),
        "peak_gib": None if None in peaks else max(peaks),
        "agent_tokens_per_second": case.K * case.B * case.T * accelerator.num_processes / seconds,
        "useful_tflops_per_gpu": flops / seconds / 1e12,
    }


if __name__ == "__main__":
    with input_errors_end_the_program():
        file = Path(sys.argv[2])
        figures, is_first = measure(json.loads(sys.argv[1]), file.parent)
        if is_first:
            file.write_text(json.dumps(figures))
