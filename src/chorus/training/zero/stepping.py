"""The optimizer step under DeepSpeed: clip to one norm over all agents, step those whose gradient is finite.

At stages 1 and 2 with the optimizer on the device, DeepSpeed's gradient checks are off: it would compute
every norm again, and make the host wait for the device twice, for an overflow and for the norm. The norms
that show which agents to skip are also used for clipping, inside AdamW. Elsewhere DeepSpeed clips.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from chorus.mesh import Mesh
from chorus.spans import span
from chorus.training.optimizer import joint_norm, skip_non_finite
from chorus.training.zero import partitions


def clip_and_step(module: Any, max_grad_norm: float, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """As `optimizer.clip_and_step`, on this process's partitions.

    Args:
        module: DeepSpeed's engine, after the last backward of a step.
        max_grad_norm: 0 clips nothing.

    Returns:
        norm_K: each agent's gradient norm, before clipping. All are infinite after an fp16 overflow.
        grad_norm: the norm over the finite ones, a scalar.
    """
    zero = module.optimizer
    if getattr(zero, "compute_grad_norm", True):
        return _step_by_deepspeed(module, mesh)
    own_K = _agent_norms(module)
    skip_non_finite(zero.optimizer.param_groups, own_K)
    norm_K = mesh.gather_agents(own_K)
    grad_norm = joint_norm(norm_K)
    if max_grad_norm > 0:  # AdamW divides the gradient by it, in fp32
        zero.optimizer.grad_scale = ((grad_norm + 1e-6) / max_grad_norm).clamp(min=1.0).float()
    module.step()
    return norm_K, grad_norm


def _step_by_deepspeed(module: Any, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """DeepSpeed silently skips the step of all agents when a gradient is not finite.

    So non-finite gradients are zeroed before DeepSpeed sees them, except under fp16, where an overflow must
    skip the whole step.
    """
    zero = module.optimizer
    norm_K = torch.zeros(len(zero.optimizer.param_groups), dtype=torch.float64, device=module.device)
    if float(zero.loss_scale) <= 1:
        norm_K = _agent_norms(module)
        skip_non_finite(zero.optimizer.param_groups, norm_K)
        sound = norm_K.isfinite().tolist()  # DeepSpeed waits for the device anyway
        for own, is_sound in zip(partitions.gradients(zero), sound, strict=True):
            if not is_sound:
                partitions.clear_gradient(zero, own)
    module.step()
    grad_norm = torch.as_tensor(module.get_global_grad_norm())
    norm_K = mesh.gather_agents(norm_K)
    return norm_K.fill_(math.inf) if zero.overflow else norm_K, grad_norm


def _agent_norms(module: Any) -> Tensor:
    """norm_K: each agent's gradient norm over the processes that share it. In float64, because squares of
    fp32 norms overflow. A collective call."""
    zero = module.optimizer
    gradients = partitions.gradients(zero)
    norms = [
        get_total_norm([torch.linalg.vector_norm(part, dtype=torch.float32) for part in own])
        for own in gradients
    ]
    squared_K = torch.stack(norms).to(module.device, torch.float64).square()
    with span("communication"):
        torch.distributed.all_reduce(squared_K, group=zero.dp_process_group)
    return squared_K.sqrt().to(gradients[0][0].device)
