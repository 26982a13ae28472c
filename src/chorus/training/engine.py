"""Accelerate and DeepSpeed behind one interface: the training loop sees an engine, whichever it is.

Plain (one process or DDP) and ZeRO differ in who clips, who steps and who divides by the accumulation steps.
The engine hides that: `backward` takes a micro-batch's share of the objective, shares add up, and `step`
clips, steps and zeroes.
"""

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from chorus.collectives import described, limit_waiting, refuse_differences
from chorus.config.engine import EngineSettings
from chorus.config.training import TrainingSettings
from chorus.errors import InputError
from chorus.model.adapters import TensorId
from chorus.model.agents import Agents
from chorus.progress import announced
from chorus.spans import span
from chorus.training.optimizer import adamw, clip_and_step, skip_non_finite
from chorus.training.step import StepResult
from chorus.training.zero import partitions, stage3
from chorus.training.zero.deepspeed_json import (
    check_launcher,
    deepspeed_json,
    deepspeed_wanted,
    look_up_no_operators,
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
def make_accelerator(engine: EngineSettings, training: TrainingSettings) -> Accelerator:
    """The Accelerator of this run, plain or DeepSpeed. The launcher, DeepSpeed's JSON and configs.yaml must
    agree.

    Raises:
        InputError: they contradict each other.
    """
    check_launcher(engine, training)
    with_deepspeed = deepspeed_wanted(engine)
    precision = decide_precision(engine.mixed_precision)
    on_gpu = torch.cuda.is_available()
    handlers: list[Any] = [
        AutocastKwargs(enabled=False),  # every dtype in the forward is explicit; autocast would add casts
        DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
    ]
    # Unnamed, Accelerate sees one process where DeepSpeed sees several on CPUs. None leaves it to Accelerate.
    backend = "gloo" if with_deepspeed and not on_gpu else None
    handlers.append(
        InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=engine.collective_timeout_s))
    )
    plugin = None
    if with_deepspeed:
        look_up_no_operators()
        _single_process_rendezvous()
        num_processes = int(os.environ["WORLD_SIZE"])
        plugin = DeepSpeedPlugin(
            hf_ds_config=deepspeed_json(engine, training, precision, num_processes), zero3_init_flag=False
        )
    accelerator = Accelerator(
        cpu=not on_gpu and not with_deepspeed,  # `cpu` would make Accelerate ignore DeepSpeed
        # bf16 needs no scaler, and Accelerate's wrapper would copy every output to fp32
        mixed_precision="no" if precision == "bf16" and not with_deepspeed else precision,
        deepspeed_plugin=plugin,
        # A plugin, because an integer would give way to the launcher's environment.
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


def _single_process_rendezvous() -> None:
    """Set what a launcher of several processes would have set,
    for `use_deepspeed: true` in a lone process."""
    if "LOCAL_RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(alone)


@dataclass
class Engine:
    """What the training loop needs of Accelerate and DeepSpeed.

    Attributes:
        agents: the modes' own module, for evaluation and saving.
        module: the same, wrapped by DDP or DeepSpeed, for training.
        description: one line for the log.
    """

    accelerator: Accelerator
    agents: Agents
    module: nn.Module
    optimizer: torch.optim.Optimizer
    max_grad_norm: float
    description: str

    @property
    def is_deepspeed(self) -> bool:
        return self.accelerator.distributed_type is DistributedType.DEEPSPEED

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    @property
    def process_index(self) -> int:
        return self.accelerator.process_index

    @contextmanager
    def micro_batch(self, is_last: bool) -> Iterator[None]:
        """The context of one micro-batch's forward and backward.

        Args:
            is_last: of its optimiser step. DDP reduces gradients in the backward pass of the last one alone,
                and so does DeepSpeed below stage 2.
        """
        if self.is_deepspeed:
            cast(Any, self.module).set_gradient_accumulation_boundary(is_last)
        with nullcontext() if is_last else self.accelerator.no_sync(self.module):
            yield

    def backward(self, share: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the step's objective.

        The gradient of a step is that of the sum of all shares, over micro-batches and processes. DDP and
        ZeRO average over processes, and Accelerate and DeepSpeed divide by the accumulation steps: the
        factors here undo both.
        """
        loss = share * (self.num_processes * self.accelerator.gradient_accumulation_steps)
        with span("backward_pass"):
            if self.is_deepspeed:  # `accelerator.backward` would also step
                cast(Any, self.module).backward(loss)
            else:
                self.accelerator.backward(loss)

    def step(self, lr: float) -> StepResult:
        """Clip the gradients, update every agent whose gradient is finite, and zero them."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with span("optimizer_step"):
            norm_K, grad_norm = self._step_zero() if self.is_deepspeed else self._step_plain()
            return StepResult(lr, norm_K, grad_norm, self.loss_scale)

    def _step_plain(self) -> tuple[Tensor, Tensor]:
        """Each agent's gradient norm, and that over the finite ones."""
        self.accelerator.unscale_gradients()
        return clip_and_step(self.optimizer, list(self.agents.adapters().values()), self.max_grad_norm)

    def _step_zero(self) -> tuple[Tensor, Tensor]:
        """The same by DeepSpeed, which silently skips the step of all agents when a gradient is not finite.

        So non-finite gradients are cleared before DeepSpeed sees them. Not under fp16, where an overflow must
        skip the whole step.
        """
        zero: Any = self.module.optimizer
        norm_K = torch.zeros(len(self.agents.agents), dtype=torch.float64, device=self.accelerator.device)
        if self.loss_scale() <= 1:
            gradients = partitions.gradients(zero)
            norm_K = torch.stack([get_total_norm(own).to(norm_K) for own in gradients])
            squared_K = norm_K.square()
            with span("communication"):
                torch.distributed.all_reduce(squared_K, group=zero.dp_process_group)
            norm_K = squared_K.sqrt().to(gradients[0][0].device)
            skip_non_finite(zero.optimizer.param_groups, norm_K)
            for own, is_sound in zip(
                gradients, norm_K.isfinite().tolist(), strict=True
            ):  # DeepSpeed waits as well
                if not is_sound:
                    partitions.clear_gradient(zero, own)
        cast(Any, self.module).step()
        grad_norm = torch.as_tensor(cast(Any, self.module).get_global_grad_norm())
        return norm_K.fill_(math.inf) if zero.overflow else norm_K, grad_norm

    def loss_scale(self) -> float:
        """fp16's; 1 in other precisions."""
        if self.is_deepspeed:
            return float(cast(Any, self.module.optimizer).loss_scale)
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else scaler.get_scale()

    def unsharded(self) -> AbstractContextManager[None]:
        """The context of passes beside training, such as evaluation: every process holds the whole base, so
        processes may run different numbers of passes. Entering and leaving it are collective calls."""
        if zero_stage(self.accelerator) < 3:
            return nullcontext()
        return stage3.unsharded(self.module, list(self.agents.adapters().values()))

    def gather(self, own: Tensor) -> Tensor:
        """Concatenate `own` over processes along its first axis; a gradient flows to the own slice only.

        That is enough: each process adds its own slice's part, and the reduction of gradients sums the parts.
        """
        if self.num_processes == 1:
            return own
        with span("communication"):
            parts = list(self.accelerator.gather(own.detach()).chunk(self.num_processes))  # pyright: ignore
        parts[self.process_index] = own
        return torch.cat(parts)

    def adapter_values(self) -> dict[TensorId, Tensor]:
        """Every adapter tensor in fp32 on the CPU; under DeepSpeed the master weights. A collective call."""
        read = Tensor.detach
        if self.is_deepspeed:
            from deepspeed.utils import (
                safe_get_full_fp32_param as read,
            )  # two seconds of imports for those who use it
        flat = {agent: cast(Tensor, read(own)).float().cpu() for agent, own in self.agents.adapters().items()}
        return self.agents.named(flat)

    def sum(self, own: Tensor) -> Tensor:
        """The sum of `own` over processes."""
        if self.num_processes == 1:
            return own
        with span("communication"):
            return cast(Tensor, self.accelerator.reduce(own, "sum"))

    def close(self) -> None:
        """End training: let go of the agents and destroy the
        process group. Does not wait for other processes."""
        self.unwrap()
        self.accelerator.end_training()

    def unwrap(self) -> None:
        """Drop the wrapper of DDP or DeepSpeed around the agents. The engine cannot train afterwards.

        DDP's C++ part also holds the process group. If it were the last to let go, it would destroy the group
        while it holds Python's lock, and gloo's threads may wait for that lock: a hang at exit.
        """
        self.module = self.agents
        self.accelerator.free_memory()


@announced("starting the engine")
def start_engine(accelerator: Accelerator, agents: Agents, settings: TrainingSettings) -> Engine:
    """Wrap the agents and their optimizer for training, and check that the engine is the one asked for.

    Raises:
        InputError: processes hold other agents, in another order, or another base. DDP and DeepSpeed would
            overwrite all tensors with the first process's, one after the other, whatever they are.
    """
    named = (
        (f"agent {k}, {path} ({matrix})", own) for (k, path, matrix), own in agents.adapter_tensors().items()
    )
    refuse_differences(described(chain(named, agents.named_parameters(), agents.named_buffers())))
    adapters = list(agents.adapters().values())
    num_elements = sum(map(torch.numel, adapters))
    optimizer = adamw(adapters, settings.lr, settings.weight_decay)
    stage = zero_stage(accelerator)
    module, optimizer = accelerator.prepare(agents, optimizer)
    if accelerator.init_handler is not None and accelerator.init_handler.timeout is not None:
        # DeepSpeed has made process groups of its own.
        limit_waiting(int(accelerator.init_handler.timeout.total_seconds()))
    description = f"plain Accelerate, {accelerator.num_processes} process(es), {accelerator.device}"
    if stage > 0:
        assert module.zero_optimization_stage() == stage, "DeepSpeed was asked for, and is not active"
        partitions.make_state(module.optimizer)
        num_own = sum(flat.numel() for _, flat in partitions.partitions(module.optimizer))
        description = (
            f"DeepSpeed ZeRO-{stage} is active: {accelerator.num_processes} process(es), "
            f"{accelerator.device}, {num_own:,} of {num_elements:,} optimizer elements on this process"
        )
    if stage == 3:
        stage3.register_reads(agents)
        stage3.keep_gathered(module.optimizer, adapters)
    return Engine(accelerator, agents, module, optimizer, settings.max_grad_norm, description)
