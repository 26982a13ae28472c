"""One row of a benchmark: an optimiser step of one mode, on one base, timed in processes of its own.

`modes.py` calls `measure` in a fresh process. `table.py` starts this file by a launcher, on one or several
processes:

    accelerate launch [...] benchmarks/measure.py '[{"model": "tiny", "K": 2, ...}, ...]' FOLDER

where the first process writes the figures of row N to FOLDER/N.json. Weights and token ids are random, and
the same on every process and in every row.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from baselines import Switching, fuse_norms
from case import Case, attention_of, lengths_of, random_batch, run_config, start, step_of
from conditions import conditions
from overlap import traced
from results import Row
from shapes import random_base
from timing import matmul_tflops, num_timed, reserved_gib, timed, wait, warm_up
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from chorus.config import Config
from chorus.data.batches import Batch
from chorus.errors import input_errors_end_the_program
from chorus.model.adapters import lora_shape
from chorus.model.agents import build_agents
from chorus.model.base import copy_sharing_storage
from chorus.model.execution import decide_execution
from chorus.model.regularisation import Regularisation
from chorus.monitoring.flops import Work, work_of
from chorus.training.engine import DTYPES, decide_precision, make_accelerator, zero_stage

TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 1e-2,
}  # relative, of losses of the same agents in another mode

LEFT_OVER = 2**30  # bytes that a row may leave behind, such as workspaces of libraries


def measure(
    case: Case,
    accelerator: Accelerator,
    config: Config,
    *,
    steps: int,
    expected_loss_K: list[float] | None = None,
    profile_to: Path | None = None,
    with_trace: bool = False,
) -> Row:
    """One row: median ms of a step after warm-up, the peak memory of those steps, and the rates. A collective
    call.

    The slowest process and the one with the most memory count.

    Raises:
        ValueError: an agent's first loss is not the expected one; then nothing is timed.
    """
    device, dtype = accelerator.device, DTYPES[decide_precision(config.mixed_precision)]
    matmul = matmul_tflops(device, dtype)
    torch.manual_seed(0)  # the base's weights
    compiled = decide_execution(config, device).compiled is True
    base = random_base(case.model, device, dtype, attention_of(case, device, dtype, compiled))
    work = work_of(base)
    batch = random_batch(case, base.config.vocab_size, device)
    step, execution, notes, close = prepare(case, config, base, batch, accelerator)

    started = time.perf_counter()
    first_loss_K = of_all_agents(step().tolist(), case, accelerator)
    first_step_s = time.perf_counter() - started
    differs = difference(first_loss_K, expected_loss_K or first_loss_K, TOLERANCE[dtype])
    num_steps = num_timed(
        steps, max(gather_object([warm_up(step, device)]))
    )  # the same number on every process
    accelerator.wait_for_everyone()
    times = list(timed(step, num_steps, device))
    if profile_to is not None:
        write_profile(
            step, profile_to / f"profile-{case.name.replace(' ', '-').replace('/', '-')}.txt", device
        )
    trace = {"trace": traced(step, accelerator)} if with_trace else {}
    figures = {
        **rates(case, work, times, matmul, accelerator),
        "warm_up_s": first_step_s,
        "first_loss": first_loss_K,
        "loss_differs": differs,
        "rows_of_the_batch": list(batch.input_BT.shape),
        "execution": execution,
        "notes": notes,
        **trace,
        "about": conditions(device, dtype),
    }
    close()
    return figures


def rates(case: Case, work: Work, times: list[float], matmul: float, accelerator: Accelerator) -> Row:
    """Of all processes together, from this one's milliseconds. A collective call."""
    ms, fastest, slowest, peaks = zip(
        *gather_object([(median(times), min(times), max(times), reserved_gib(accelerator.device))]),
        strict=True,
    )
    seconds, lengths, held = max(ms) / 1000, lengths_of(case), case.K // case.A
    useful = sum(work.useful_flops(held, length, held * length) for length in lengths) / seconds / 1e12
    return {
        "ms_per_step": max(ms),
        "ms_min": min(fastest),
        "ms_max": max(slowest),
        "steps": len(times),
        "peak_gib": None if None in peaks else max(peaks),
        "agent_tokens_per_second": held * sum(lengths) * accelerator.num_processes / seconds,
        "useful_tflops": useful,  # of each GPU
        "matmul_tflops": matmul,
        "share_of_matmul": useful / matmul,
    }


def of_all_agents(own_K: list[float], case: Case, accelerator: Accelerator) -> list[float]:
    """Each agent's figure, from those of each process's own ones. A collective call."""
    data_size = accelerator.num_processes // case.A  # neighbours, which hold the same agents
    return [value for held in gather_object([own_K])[::data_size] for value in held]


def difference(first_loss_K: list[float], expected_loss_K: list[float], tolerance: float) -> float:
    """The largest relative difference of an agent's loss from the
    expected one, which must be within the tolerance."""
    worst = max(abs(own / other - 1) for own, other in zip(first_loss_K, expected_loss_K, strict=True))
    if not worst <= tolerance:
        raise ValueError(
            f"losses {first_loss_K} differ by {worst:.1e} from {expected_loss_K} of the same agents"
        )
    return worst


def prepare(
    case: Case, config: Config, base: PreTrainedModel, batch: Batch, accelerator: Accelerator
) -> tuple[Callable[[], Tensor], str, str, Callable[[], object]]:
    """The step of a case, from the same adapters in every mode;
    its execution and notes, for the table; its end."""
    attention = f"{base.config._attn_implementation} attention"
    if "switching" not in case.mode:
        execution = decide_execution(config, accelerator.device)
        engine = start(config, base, execution, accelerator)
        ways = {"compiled": execution.compiled, "captured": execution.captured}
        return (
            step_of(engine, config, batch),
            ", ".join(way for way in ways if ways[way]),
            attention,
            engine.unwrap,
        )
    shape = lora_shape(config)
    agents = build_agents("sequential", copy_sharing_storage(base), case.K, shape, Regularisation(0, 0, 0))
    initial = {identity: tensor.detach() for identity, tensor in agents.adapter_tensors().items()}
    is_tuned = case.mode == "tuned switching"
    notes = f"{attention}, {fuse_norms(base)}" if is_tuned else attention
    switching = Switching(base, shape, initial, tuned=is_tuned, recompute=case.recompute != "none")
    return lambda: switching.step(batch), "", notes, lambda: None


def write_profile(step: Callable[[], Any], path: Path, device: torch.device) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
        wait(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    averages = profiler.key_averages()
    by_device = averages.table(
        sort_by=f"self_{device.type}_time_total", row_limit=60, max_name_column_width=90
    )
    path.write_text(f"{by_device}\n{averages.table(sort_by='self_cpu_time_total', row_limit=40)}\n")


def measure_alone(case: Case, rank: int, **settings: Any) -> Row:
    """`measure` in this process alone. A switching baseline takes its adapters from `sequential` mode."""
    config = run_config(case._replace(mode="sequential") if "switching" in case.mode else case, rank)
    return measure(case, make_accelerator(config, config), config, **settings)


def measure_as_launched(rows: list[Row], folder: Path) -> None:
    """Measure rows of `table.py`, one after the other, in the processes that a launcher started.

    Rows share the start of the processes. It ends early where a row leaves memory behind: what is left over
    is for a fresh launch.
    """
    accelerator = None
    for place, row in enumerate(rows):
        AcceleratorState._reset_state()  # DeepSpeed's JSON is another one for each row
        case = Case(**{field: row[field] for field in Case._fields})
        config = run_config(case, row["rank"], str(folder))
        accelerator = make_accelerator(config, config, case.K)
        assert accelerator.num_processes == row["processes"], (
            "the launcher started another number of processes"
        )
        assert zero_stage(accelerator) == (2 if row["engine"] == "zero2" else 0), (
            "another engine than the row's"
        )
        figures = measure(case, accelerator, config, steps=row["steps"], with_trace=row["with_trace"])
        if accelerator.is_main_process:
            new = folder / f"{place}.new"
            new.write_text(json.dumps(figures))
            new.rename(folder / f"{place}.json")
        if max(gather_object([held_after_clearing(accelerator.device)])) > LEFT_OVER:
            break
    if accelerator is not None:
        accelerator.end_training()


def held_after_clearing(device: torch.device) -> int:
    """Bytes that are allocated after everything of a row was let go of."""
    gc.unfreeze()  # what `warm_up` froze
    gc.collect()
    torch._dynamo.reset()  # or the rows together would compile a layer more often than it allows
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


if __name__ == "__main__":
    with input_errors_end_the_program():
        measure_as_launched(json.loads(sys.argv[1]), Path(sys.argv[2]))
