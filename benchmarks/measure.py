"""One row of modes.py: a step of one mode, on one base, timed in a process of its own."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from baselines import Switching, fuse_norms
from case import Case, attention_of, lengths_of, random_batch, run_config, start, step_of
from shapes import random_base
from timing import matmul_tflops, num_timed, reserved_gib, timed, wait, warm_up
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from chorus.data.batches import Batch
from chorus.model.adapters import lora_shape
from chorus.model.agents import Regularisation, build_agents, copy_sharing_storage
from chorus.model.execution import decide_execution
from chorus.monitoring.flops import Work, work_of
from chorus.training.engine import make_accelerator

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # of device types
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative, of losses of the same agents in another mode


def measure(case: Case, rank: int, steps: int, expected_loss_K: list[float] | None, profile_to: Path | None) -> dict:
    """One row: median ms of a step after warm-up, the peak memory of those steps, and what follows from them.

    Raises:
        ValueError: an agent's first loss is not the expected one; then nothing is timed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[device.type]
    matmul = matmul_tflops(device, dtype)
    torch.manual_seed(0)  # of the base's weights
    base = random_base(case.model, device, dtype, attention_of(case, device, dtype, case.compiled is True))
    work = work_of(base)
    batch = random_batch(case, base.config.vocab_size, device)
    step, notes = prepare(case, rank, base, batch)

    started = time.perf_counter()
    first_loss_K = step().tolist()
    first_step_s = time.perf_counter() - started
    differs = difference(first_loss_K, expected_loss_K or first_loss_K, TOLERANCE[dtype])
    times = list(timed(step, num_timed(steps, warm_up(step, device)), device))
    if profile_to is not None:
        write_profile(step, profile_to / f"profile-{case.name.replace(' ', '-').replace('/', '-')}.txt", device)
    return {
        **rates(case, work, median(times) / 1000, matmul),
        "ms_min": min(times),
        "ms_max": max(times),
        "steps": len(times),
        "peak_gib": reserved_gib(device),
        "warm_up_s": first_step_s,
        "first_loss": first_loss_K,
        "loss_differs": differs,
        "rows_of_the_batch": list(batch.input_BT.shape),
        "notes": notes,
    }


def rates(case: Case, work: Work, seconds: float, matmul: float) -> dict[str, float]:
    """What follows from the seconds of a step."""
    lengths = lengths_of(case)
    useful = sum(work.useful_flops(case.K, length, case.K * length) for length in lengths) / seconds / 1e12
    return {
        "ms_per_step": 1000 * seconds,
        "agent_tokens_per_second": case.K * sum(lengths) / seconds,
        "useful_tflops": useful,
        "matmul_tflops": matmul,
        "share_of_matmul": useful / matmul,
    }


def difference(first_loss_K: list[float], expected_loss_K: list[float], tolerance: float) -> float:
    """The largest relative difference of an agent's loss from the expected one, which must be within the tolerance."""
    worst = max(abs(own / other - 1) for own, other in zip(first_loss_K, expected_loss_K, strict=True))
    if not worst <= tolerance:
        raise ValueError(f"losses {first_loss_K} differ by {worst:.1e} from {expected_loss_K} of the same agents")
    return worst


def prepare(case: Case, rank: int, base: PreTrainedModel, batch: Batch) -> tuple[Callable[[], Tensor], str]:
    """The step of a case, from the same adapters in every mode, and notes for the table."""
    notes = f"{base.config._attn_implementation} attention"
    if "switching" not in case.mode:
        config = run_config(case, rank)
        accelerator = make_accelerator(config)
        engine = start(config, base, decide_execution(config, accelerator.device), accelerator)
        return step_of(engine, config, batch), notes
    shape = lora_shape(run_config(case._replace(mode="sequential"), rank))
    agents = build_agents("sequential", copy_sharing_storage(base), case.K, shape, Regularisation(0, 0, 0))
    initial = {identity: tensor.detach() for identity, tensor in agents.adapter_tensors().items()}
    tuned = case.mode == "tuned switching"
    if tuned:
        notes = f"{notes}, {fuse_norms(base)}"
    switching = Switching(base, shape, initial, tuned=tuned, recompute=case.recompute != "none")
    return lambda: switching.step(batch), notes


def write_profile(step: Callable[[], Any], path: Path, device: torch.device) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
        wait(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    averages = profiler.key_averages()
    key = f"self_{device.type}_time_total"
    by_device = averages.table(sort_by=key, row_limit=60, max_name_column_width=90)
    path.write_text(f"{by_device}\n{averages.table(sort_by='self_cpu_time_total', row_limit=40)}\n")
