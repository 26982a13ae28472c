"""A process's partition of each agent's gradient and AdamW state under DeepSpeed, at any stage, on GPU or
CPU.

Each agent is a parameter group (optimizer.py), and DeepSpeed partitions groups separately. `zero` is
DeepSpeed's optimizer, `module.optimizer`. DeepSpeed has no public interface for any of this.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


def partitions(zero: Any) -> list[tuple[int, Tensor]]:
    """The flat fp32 weights that this process steps, with the index of the agent: several for some agents."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        owners = [
            zero.sub_group_to_group_id[place] for place in range(len(zero.fp32_partitioned_groups_flat))
        ]
        return list(zip(owners, zero.fp32_partitioned_groups_flat, strict=True))
    return list(enumerate(zero.single_partition_of_fp32_groups))


def make_state(zero: Any) -> None:
    """Create AdamW's state before the first step. Otherwise it is created group by group, and stages 1 and 2
    link it to the adapters' tensors only once, after the first group's step.
    """
    for _, flat in partitions(zero):
        moments = {name: torch.zeros_like(flat) for name in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def steps_taken(zero: Any) -> list[int]:
    """AdamW's step count of each agent of this process."""
    return list({agent: int(zero.optimizer.state[flat]["step"]) for agent, flat in partitions(zero)}.values())


def set_steps_taken(zero: Any, steps: Sequence[int]) -> None:
    """The counterpart of `steps_taken`."""
    for agent, flat in partitions(zero):
        zero.optimizer.state[flat]["step"].fill_(steps[agent])


def gradients(zero: Any) -> list[list[Tensor]]:
    """This process's part of each agent's gradient, between the last backward pass of a step and the step."""
    if is_on_cpu(zero) and hasattr(zero, "_wait_for_offload_copies"):
        zero._wait_for_offload_copies()
    found: dict[int, list[Tensor]] = {}
    for place, (agent, flat) in enumerate(partitions(zero)):
        own = [flat.grad] if is_on_cpu(zero) else zero.averaged_gradients[place]
        found.setdefault(agent, []).extend(own)  # pyright: ignore[reportArgumentType]
    return list(found.values())


def clear_gradient(zero: Any, gradient: Sequence[Tensor]) -> None:
    """Zero an agent's gradient, wherever DeepSpeed looks for non-finite values."""
    for part in gradient:
        part.zero_()
    if is_on_cpu(zero):  # already detected while the gradient was copied to the CPU
        for norm in zero.norm_for_param_grads.values():
            norm.nan_to_num_(0.0, 0.0, 0.0)
        zero.local_overflow = False
    if hasattr(zero, "grad_partitions_flat_buffer"):
        zero.grad_partitions_flat_buffer.nan_to_num_(0.0, 0.0, 0.0)


def is_on_cpu(zero: Any) -> bool:
    """Whether the optimizer's state is on the CPU and the agents are not."""
    return bool(getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False))
