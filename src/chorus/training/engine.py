"""One interface for Accelerate and DeepSpeed, so that the training loop does not depend on the engine.

Plain (one process or DDP) and ZeRO differ in where clipping, stepping and division by the accumulation steps
happen. The engine hides that: `backward` takes a micro-batch's share of the objective, shares add up, and
`step` clips, steps and zeroes.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DeepSpeedPlugin,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from chorus.collectives import described, limit_waiting, refuse_differences
from chorus.config.engine import EngineSettings
from chorus.config.per_agent import NumberOrList, of_agent
from chorus.config.training import TrainingSettings
from chorus.errors import InputError
from chorus.mesh import Mesh, decide_agent_size, make_mesh, refuse_spread_agents
from chorus.model.adapters import TensorId
from chorus.model.agents import Agents
from chorus.model.base import Head
from chorus.progress import announced
from chorus.spans import span
from chorus.training.optimizer import adamw, clip_and_step
from chorus.training.step import StepResult
from chorus.training.zero import partitions, stage3, stepping
from chorus.training.zero.data_group import data_group_of
from chorus.training.zero.deepspeed_json import (
    deepspeed_json,
    leave_clipping_to_chorus,
    refusals_of_deepspeed,
)
from chorus.training.zero.launcher import (
    check_launcher,
    deepspeed_wanted,
    look_up_no_operators,
    meeting_failures_named,
    single_process_rendezvous,
)

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def decide_precision(mixed_precision: str) -> str:
    """ "auto" decided: bf16 where the GPU has it, fp32 ("no") elsewhere.

    Raises:
        InputError: fp16 without a GPU, where loss scaling has nothing to run on.
    """
    if mixed_precision == "auto":
        return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("key 'mixed_precision' is fp16, which needs a GPU; set it to auto, bf16 or no")
    return mixed_precision


@announced("starting the processes")
def make_accelerator(
    engine: EngineSettings, training: TrainingSettings, num_agents: int | Literal["auto"] = 1
) -> Accelerator:
    """The Accelerator of this run, plain or DeepSpeed. The launcher, DeepSpeed's JSON and configs.yaml must
    agree.

    Args:
        num_agents: of the run, to decide `agent_parallel_size`.

    Raises:
        InputError: they contradict each other, or the agents cannot be spread as the key says.
    """
    check_launcher(engine, training)
    with_deepspeed = deepspeed_wanted(engine)
    precision = decide_precision(engine.mixed_precision)
    on_gpu = torch.cuda.is_available()
    handlers: list[Any] = [
        AutocastKwargs(
            enabled=False
        ),  # every dtype in the forward pass is explicit; autocast would add casts
    ]
    # By default Accelerate sees one process where DeepSpeed sees several on CPUs. None: Accelerate decides.
    backend = "gloo" if with_deepspeed and not on_gpu else None
    handlers.append(
        InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=engine.collective_timeout_s))
    )
    plugin = None
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    size = decide_agent_size(engine.agent_parallel_size, num_agents, num_processes)
    if with_deepspeed:
        look_up_no_operators()
        single_process_rendezvous()
        settings = leave_clipping_to_chorus(
            deepspeed_json(engine, training, precision, num_processes // size)
        )
        plugin = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
    refuse_spread_agents(size, precision, stage=0 if plugin is None else plugin.zero_stage)
    with meeting_failures_named():
        accelerator = Accelerator(
            cpu=not on_gpu and not with_deepspeed,  # `cpu` would make Accelerate ignore DeepSpeed
            # bf16 needs no scaler, and Accelerate's wrapper would copy every output to fp32
            mixed_precision="no" if precision == "bf16" and not with_deepspeed else precision,
            deepspeed_plugin=plugin,
            # A plugin, because the launcher's environment would override an integer.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=training.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            kwargs_handlers=handlers,
        )
    if (accelerator.distributed_type is DistributedType.DEEPSPEED) != with_deepspeed:
        started = accelerator.distributed_type.value
        raise InputError(
            f"key 'use_deepspeed' is {engine.use_deepspeed}: DeepSpeed is asked for and not active: "
            f"Accelerate started {started} in its place; launch without --cpu and ACCELERATE_USE_CPU, or "
            "set use_deepspeed to false"
        )
    limit_waiting(engine.collective_timeout_s)
    unset_hf_deepspeed_config()  # under stage 3 transformers would shard the base before it is checked
    return accelerator


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's stage: 3 has the base in shards; 0 is no DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


@dataclass
class Engine:
    """What the training loop needs from Accelerate and DeepSpeed.

    Attributes:
        agents: the modes' own module, for evaluation and saving.
        module: the same, wrapped by DDP or DeepSpeed, for training.
        description: one line for the log.
        mesh: the rows and the agents of this process, and its groups.
    """

    accelerator: Accelerator
    agents: Agents
    module: nn.Module
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    description: str
    mesh: Mesh

    @property
    def is_deepspeed(self) -> bool:
        return self.accelerator.distributed_type is DistributedType.DEEPSPEED

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """The context of one micro-batch's forward and backward.

        Args:
            is_last: of its optimiser step. DDP, and DeepSpeed below stage 2, reduce gradients only in the
                last one's backward pass.
        """
        if self.is_deepspeed:
            cast(Any, self.module).set_gradient_accumulation_boundary(is_last)
        with nullcontext() if is_last else self.accelerator.no_sync(self.module):
            yield

    def backward(self, share: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the step's objective.

        The gradient of a step is that of the sum of all shares, over micro-batches and processes. DDP and
        ZeRO average over the data group, and Accelerate and DeepSpeed divide by the accumulation steps: the
        factors here undo both.
        """
        loss = share * (self.mesh.data_size * self.accelerator.gradient_accumulation_steps)
        with span("backward_pass"):
            if self.is_deepspeed:  # `accelerator.backward` would also step
                cast(Any, self.module).backward(loss)
            else:
                self.accelerator.backward(loss)

    def step(self, lr: NumberOrList) -> StepResult:
        """Clip the gradients, update every agent whose gradient is finite, and zero them.

        Args:
            lr: the learning rate of all agents, or of each agent of the run.
        """
        for agent, group in zip(self.agents.agents, self.optimizer.param_groups, strict=True):
            group["lr"] = of_agent(lr, agent)
        with span("optimizer_step"):
            if self.is_deepspeed:
                norm_K, grad_norm = stepping.clip_and_step(self.module, self.max_grad_norm, self.mesh)
            else:
                norm_K, grad_norm = self._step_plain()
            return StepResult(lr, norm_K, grad_norm, self.loss_scale)

    def _step_plain(self) -> tuple[Tensor, Tensor]:
        """Each agent's gradient norm, and that over the finite ones."""
        self.accelerator.unscale_gradients()
        adapters = list(self.agents.adapters().values())
        return clip_and_step(self.optimizer, adapters, self.max_grad_norm, self.mesh.gather_agents)

    def loss_scale(self) -> float:
        """fp16's; 1 in other precisions."""
        if self.is_deepspeed:
            return float(cast(Any, self.module.optimizer).loss_scale)
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()

    def head(self) -> Head:
        """The output layer, for a loss that reads it outside of the agents' passes. Under ZeRO-3 a full copy,
        because its shards are gathered only within passes. A collective call.
        """
        head = self.agents.head()
        return stage3.whole_copy(head) if zero_stage(self.accelerator) == 3 else head

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """The context of passes outside of training, such as evaluation: every process holds the whole base
        and all agents, so processes may run different numbers of passes. Entering and leaving it are
        collective calls.
        """
        adapters = self.agents.adapters()
        whole = nullcontext()
        if zero_stage(self.accelerator) == 3:
            whole = stage3.unsharded(self.module, list(adapters.values()))
        others = {k: own for k, own in self._of_all_agents(adapters).items() if k not in adapters}
        with whole, self.agents.also_holding(others):
            yield

    def _of_all_agents(self, own: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Gather a flat tensor for each agent from the processes that hold them. A collective call."""
        if self.mesh.agent_size == 1:
            return dict(own)
        found: dict[int, Tensor] = {}
        for place, flat in enumerate(own.values()):
            rows = self.mesh.gather_agents(flat.detach()[None].to(self.accelerator.device))
            found |= {index * len(own) + place: row for index, row in enumerate(rows)}
        return dict(sorted(found.items()))

    def to_host(self, own: Mapping[int, Tensor]) -> dict[TensorId, Tensor]:
        """Flat tensors of this process's agents, as those of all agents by identity: in fp32, on the CPU. A
        collective call."""
        flat = {agent: flat_F.float().cpu() for agent, flat_F in self._of_all_agents(own).items()}
        return self.agents.named(flat)

    def adapter_values(self) -> dict[TensorId, Tensor]:
        """Every adapter tensor in fp32 on the CPU; under DeepSpeed the master weights. A collective call."""
        read = Tensor.detach
        if self.is_deepspeed:
            from deepspeed.utils import (
                safe_get_full_fp32_param as read,
            )  # takes two seconds: imported only when needed
        adapters = self.agents.adapters()
        return self.to_host({agent: cast(Tensor, read(own)) for agent, own in adapters.items()})

    def close(self) -> None:
        """End training: release the agents and destroy the process group. Does not wait for others."""
        self.unwrap()
        self.accelerator.end_training()

    def unwrap(self) -> None:
        """Drop the wrapper of DDP or DeepSpeed around the agents. The engine cannot train afterwards.

        DDP's C++ part also holds the process group. If it held the last reference, it would destroy the group
        while holding Python's lock, for which gloo's threads may wait: a deadlock at exit.
        """
        self.module = self.agents
        self.accelerator.free_memory()


@announced("starting the engine")
def start_engine(
    accelerator: Accelerator, agents: Agents, settings: TrainingSettings, mesh: Mesh | None = None
) -> Engine:
    """Wrap the agents and their optimizer for training, and check that the engine is the one asked for.

    Args:
        mesh: the one with which the agents were built; None: every process holds all of them.

    Raises:
        InputError: the agents, their order or the base differ between the processes of a data group. DDP and
            DeepSpeed would silently overwrite every process's tensors with those of the first.
    """
    mesh = mesh or make_mesh(accelerator)
    named = (
        (f"agent {k}, {path} ({matrix})", own) for (k, path, matrix), own in agents.adapter_tensors().items()
    )
    held = described(chain(named, agents.named_parameters(), agents.named_buffers()))
    refuse_differences(held, mesh.data_ranks[0], mesh.data_group)
    optimizer = adamw(agents.adapters(), settings.lr, settings.weight_decay)
    adapters = list(agents.adapters().values())
    num_elements = sum(map(torch.numel, adapters))
    stage = zero_stage(accelerator)
    if stage > 0:
        with data_group_of(mesh, adapters), refusals_of_deepspeed():
            module, optimizer = accelerator.prepare(agents, optimizer)
    else:
        # Accelerate's own DDP would reduce gradients over all processes, including those with other agents.
        module = accelerator.prepare_model(agents, evaluation_mode=True)
        optimizer = accelerator.prepare_optimizer(optimizer)
        if mesh.data_size > 1:
            module = _reduced(module, accelerator.device, mesh)
    if accelerator.init_handler is not None and accelerator.init_handler.timeout is not None:
        # DeepSpeed has created further process groups.
        limit_waiting(int(accelerator.init_handler.timeout.total_seconds()))
    description = f"plain Accelerate, {accelerator.num_processes} process(es), {accelerator.device}"
    if stage > 0:
        assert cast(Any, module).zero_optimization_stage() == stage, (
            "DeepSpeed was asked for, and is not active"
        )
        partitions.make_state(module.optimizer)
        num_own = sum(flat.numel() for _, flat in partitions.partitions(module.optimizer))
        description = (
            f"DeepSpeed ZeRO-{stage} is active: {accelerator.num_processes} process(es), "
            f"{accelerator.device}, {num_own:,} of {num_elements:,} optimizer elements on this process"
        )
    if mesh.agent_size > 1:
        on_this = ", ".join(map(str, agents.agents))
        description += f"; agents over {mesh.agent_size} processes: {on_this} on this one"
    if stage == 3:
        stage3.register_reads(agents)
        stage3.keep_gathered(module.optimizer, adapters)
    return Engine(accelerator, agents, module, optimizer, settings.max_grad_norm, description, mesh)


def _reduced(module: nn.Module, device: torch.device, mesh: Mesh) -> DistributedDataParallel:
    """The module under DDP, which reduces gradients over the data group."""
    return DistributedDataParallel(
        module,
        device_ids=None if device.type == "cpu" else [device],
        process_group=mesh.data_group,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
