"""`num_agents: auto`: the most agents that fit, by forecast, and on a GPU also by a measured step."""

import gc
import sys
from math import ceil
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from chorus.checkpoint.state_file import StateFile, read_state_file
from chorus.checkpoint.store import checkpoints
from chorus.collectives import on_first_process
from chorus.config import Config, RunConfig
from chorus.data.batches import Sample, collate
from chorus.errors import InputError, out_of_memory
from chorus.mesh import ALONE, decide_agent_size
from chorus.model.adapters import lora_shape
from chorus.model.agents import build_agents
from chorus.model.base import copy_sharing_storage, load_base
from chorus.model.execution import decide_execution
from chorus.model.regularisation import Regularisation
from chorus.monitoring.memory import memory_limit, peak_bytes, reset_peak
from chorus.planning.forecast import GIB, Machine
from chorus.planning.memory_forecast import forecast, longest_batch, trained_bytes
from chorus.planning.way_out import way_out
from chorus.progress import announced
from chorus.training.engine import DTYPES
from chorus.training.objective import objective_of
from chorus.training.optimizer import adamw, clip_and_step

MOST_AGENTS = 64  # for more, give a number
OUT_OF_MEMORY = sys.maxsize
WAYS_OUT = "gradient_checkpointing=full, parallel_mode=sequential, a smaller batch_size or max_seq_length"


@announced("finding how many agents fit")
def decide_num_agents(
    config: Config, precision: str, accelerator: Accelerator, num_rows: int | None = None
) -> tuple[RunConfig, str]:
    """The configuration with numbers for `num_agents` and `agent_parallel_size`, and the reason for
    `num_agents`, for the log ("" if it was a number).

    A resumed run keeps the number of its checkpoint. Otherwise it is the largest, up to `MOST_AGENTS`, whose
    forecast fits `memory_fraction` of the smallest device; on a GPU lowered until a measured step fits too (a
    CPU's allocator keeps no count). Every process holds equally many. A collective call with the same result
    on all processes.

    Args:
        num_rows: to train on: no batch has more. None: of a batch that is full.

    Raises:
        InputError: not even the fewest agents fit (one; two with lambda_sw above 0), or those of the
            checkpoint cannot be spread as `agent_parallel_size` says.
    """
    count = accelerator.num_processes
    size = decide_agent_size(config.agent_parallel_size, config.num_agents, count)
    config = config.model_copy(update={"agent_parallel_size": size})
    if config.num_agents != "auto":
        return with_agents(config, config.num_agents), ""
    state = on_first_process(accelerator, lambda: newest_state(config))
    if state is not None:
        kept = state.config.num_agents
        decide_agent_size(size, kept, count)
        return with_agents(config, kept), f"num_agents auto: {kept}, as in the checkpoint"
    machine = machine_of(accelerator, config)
    limit = min(gather_object([memory_limit(accelerator.device, config.memory_fraction)]))
    sized = config.model_copy(update={"batch_size": min(config.batch_size, num_rows or config.batch_size)})
    num_agents, first, each = on_first_process(
        accelerator, lambda: most_that_fit(sized, precision, machine, limit)
    )
    taken = ""
    if accelerator.device.type == "cuda":
        num_agents, measured = lower_until_a_step_fits(sized, num_agents, each, limit, precision, accelerator)
        taken = f"a step took {measured / GIB:.2f} GiB, "
    cap = " (auto takes no more; name a number to have them)" if num_agents + size > MOST_AGENTS else ""
    needs = first + num_agents // size * each
    return with_agents(config, num_agents), (
        f"num_agents auto: {num_agents}{cap}; {taken}forecast {needs / GIB:.2f} GiB, "
        f"allowed {limit / GIB:.2f} (memory_fraction {config.memory_fraction:g} of the smallest device)"
    )


def lower_until_a_step_fits(
    config: Config, num_agents: int, each: int, limit: int, precision: str, accelerator: Accelerator
) -> tuple[int, int]:
    """The number of agents with which a real step fits `limit`, and the bytes of that step. A collective
    call.

    Raises:
        InputError: not even the fewest agents fit.
    """
    machine, device = machine_of(accelerator, config), accelerator.device
    execution = decide_execution(config, device, machine.base_in_shards)
    # Loaded only for these steps: the run's memory is forecast next, for a device without a base.
    model = load_base(config, DTYPES[precision], device, compiled=execution.compiled)
    while True:
        tried = with_agents(config, num_agents)
        measured = max(gather_object([measured_step(model, tried, precision, machine, device)]))
        if measured <= limit:
            return num_agents, measured
        held = num_agents // machine.agent_size
        excess = held // 8 if measured == OUT_OF_MEMORY else -((limit - measured) // each)
        num_agents -= max(1, excess) * machine.agent_size
        if num_agents < fewest_agents(config):
            raise InputError(_too_little(config, "a measured step", measured, limit))


def most_that_fit(config: Config, precision: str, machine: Machine, limit: int) -> tuple[int, int, int]:
    """The most agents by forecast, and the coefficients of the forecast: bytes = first + each x the agents of
    a process.

    The memory of a step is linear in the number of agents, in every mode, from two passes on.

    Raises:
        InputError: the fewest agents do not fit.
    """
    some, size = max(2, config.agents_per_pass or 0), machine.agent_size
    peaks = [forecast(with_agents(config, held * size), precision, machine).peak for held in (some, 2 * some)]
    each = max(1, (peaks[1] - peaks[0]) // some)
    first = peaks[0] - some * each
    num_agents = min(MOST_AGENTS // size, (limit - first) // each) * size
    fewest = fewest_agents(config)
    if num_agents < fewest:
        needs = first + fewest // size * each
        way = way_out(with_agents(config, fewest), precision, machine, limit)
        raise InputError(_too_little(config, f"the forecast for {fewest}", needs, limit, way))
    return num_agents, first, each


def fewest_agents(config: Config) -> int:
    """The fewest agents of a run: two where lambda_sw asks for a distance between them, and one for each
    process over which they are spread."""
    size = int(config.agent_parallel_size)
    return 2 if config.lambda_sw > 0 and size == 1 else size


def with_agents(config: Config, num_agents: int) -> RunConfig:
    """The configuration with another number of agents, checked as a whole."""
    return RunConfig.model_validate({**config.model_dump(), "num_agents": num_agents})


def newest_state(config: Config) -> StateFile | None:
    """The state of the checkpoint from which this run may resume.
    `resume` checks later that it is whole and of this run."""
    if config.resume_from_checkpoint is None:
        return None
    named = config.resume_from_checkpoint
    folders = checkpoints(Path(config.output_dir)) if named == "auto" else [Path(named)]
    for folder in folders:
        try:
            return read_state_file(folder)
        except InputError:  # damaged: `resume` will pass over it or refuse it
            continue
    return None


def machine_of(accelerator: Accelerator, config: Config) -> Machine:
    """The properties of the machine that a forecast needs."""
    plugin = (
        accelerator.state.deepspeed_plugin
        if accelerator.distributed_type is DistributedType.DEEPSPEED
        else None
    )
    settings = None if plugin is None else plugin.deepspeed_config
    count = accelerator.num_processes
    size = decide_agent_size(config.agent_parallel_size, config.num_agents, count)
    return Machine(accelerator.device.type, count, settings, size)


def measured_step(
    model: PreTrainedModel, config: RunConfig, precision: str, machine: Machine, device: torch.device
) -> int:
    """Peak bytes of this process in two optimiser steps at the longest batch; `OUT_OF_MEMORY` if they do not
    fit.

    Each process steps on its own: in a collective call, a process that runs out of memory would leave the
    others waiting. An empty tensor replaces the engine's buffers, and AdamW over a share of each adapter
    replaces a shard of the optimizer's state.
    """
    reset_peak(device)
    try:
        _two_steps(copy_sharing_storage(model), config, precision, machine, device)
        measured = peak_bytes(device)
    except Exception as error:
        if out_of_memory(error) is None:
            raise
        measured = OUT_OF_MEMORY
    gc.collect()  # module trees are reference cycles
    reset_peak(device)
    return measured


def _two_steps(
    model: PreTrainedModel, config: RunConfig, precision: str, machine: Machine, device: torch.device
) -> None:
    rates = Regularisation(config.dropconnect_p, config.lora_dropout, config.seed)
    execution = decide_execution(config, device, machine.base_in_shards)
    how = (lora_shape(config), rates, execution)
    agents = build_agents(config.parallel_mode, model, config.num_agents, *how, mesh=machine.mesh)
    shares = 1
    if machine.deepspeed is not None:
        agents.to(DTYPES[precision])
        shares = machine.mesh.data_size
    adapters = list(agents.adapters().values())
    stepped = [nn.Parameter(adapter_F.detach()[: ceil(len(adapter_F) / shares)]) for adapter_F in adapters]
    optimizer = adamw(dict(zip(agents.agents, stepped, strict=True)), config.lr, config.weight_decay)
    standing = sum(
        trained_bytes(sum(map(torch.numel, adapters)), config, DTYPES[precision], machine).values()
    )
    counted = sum(adapter_F.nbytes for adapter_F in adapters) + 2 * sum(own.nbytes for own in stepped)
    beside = torch.empty(max(0, standing - counted), dtype=torch.uint8, device=device)
    length = longest_batch(config)
    row = Sample(torch.zeros(length + 1, dtype=torch.int64), torch.ones(length + 1, dtype=torch.bool))
    points = min(config.swd_points_per_row, length)
    batch = collate([row] * config.batch_size, 0, config.padding, points).to(device)
    if len(adapters) == 1:  # the distance needs two agents, and takes little memory
        config = config.model_copy(update={"lambda_sw": 0.0})
    loss_fn = objective_of(config, config, ALONE, agents.head())
    for step in range(2):
        output = agents(batch, step=step)
        part = loss_fn(*output, batch, num_targets=len(batch.target_rows_N), step=step)
        del output
        part.share.backward()
        for own, adapter_F in zip(stepped, adapters, strict=True):
            own.grad = cast(Tensor, adapter_F.grad)[: len(own)]
        clip_and_step(optimizer, stepped, config.max_grad_norm)
        agents.zero_grad()
    del beside


def _too_little(config: Config, what: str, needed: int, limit: int, way: str = WAYS_OUT) -> str:
    found = "runs out of memory" if needed == OUT_OF_MEMORY else f"needs {needed / GIB:.2f} GiB"
    return (
        f"key 'num_agents' is auto, but {what} {found}, and {limit / GIB:.2f} are allowed (memory_fraction "
        f"{config.memory_fraction:g} of the smallest device); make room: {way}"
    )
