"""AdamW that skips the update of an agent with a non-finite loss or gradient; the other agents step normally.

A non-finite loss makes its agent's whole gradient NaN (see `objective`), so after the reduction of gradients
each process sees it in the agent's norm. The device decides whether to step; the host reads the norms a step
later, so that nothing waits for them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from chorus.config.per_agent import NumberOrList, of_agent


class AgentwiseAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) with a parameter group for each agent. A group whose `skip` is 1 keeps
    its weights, moments and step count.

    Fused AdamW has one such flag on the device for all groups, meant for loss scaling. Here every group has
    its own flag. DeepSpeed also steps group by group, so the flags work in its partitions.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups, overflow = (
            self.param_groups,
            getattr(self, "found_inf", None),
        )  # the flag of a loss scaler, for all groups
        try:
            for group in groups:
                self.param_groups = [group]
                self.found_inf = group["skip"] if overflow is None else torch.maximum(group["skip"], overflow)
                super().step()
        finally:
            self.param_groups, self.found_inf = groups, overflow


def adamw(
    adapters: Mapping[int, nn.Parameter], lr: NumberOrList, weight_decay: NumberOrList
) -> AgentwiseAdamW:
    """AdamW with torch's other defaults; each agent's adapter is a group.

    Args:
        adapters: of this process's agents.
        lr, weight_decay: of all agents, or of each agent of the run.
    """
    groups = [
        {
            "params": [adapter_F],
            "lr": of_agent(lr, agent),
            "weight_decay": of_agent(weight_decay, agent),
            "skip": torch.zeros((), device=adapter_F.device),
        }
        for agent, adapter_F in adapters.items()
    ]
    return AgentwiseAdamW(groups, fused=True)


def skip_non_finite(groups: Sequence[dict[str, Any]], norm_K: Tensor) -> None:
    """Set the skip flag of each agent (group) whose gradient norm is not finite."""
    for group, skip in zip(groups, (~norm_K.isfinite()).float(), strict=True):
        group["skip"] = skip


def joint_norm(norm_K: Tensor) -> Tensor:
    """The joint gradient norm of the agents with a finite norm, a scalar."""
    return torch.linalg.vector_norm(norm_K.masked_fill(~norm_K.isfinite(), 0.0))


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    adapters: Sequence[nn.Parameter],
    max_grad_norm: float,
    gather_agents: Callable[[Tensor], Tensor] = lambda own: own,
) -> tuple[Tensor, Tensor]:
    """Clip to one norm over all agents (0: not at all), step the agents whose gradient is finite, and zero
    gradients.

    Nothing here waits for the device.

    Args:
        adapters: of this process's agents.
        gather_agents: where agents are spread over processes, gathers the norms of all agents.

    Returns:
        norm_K: each agent's gradient norm, before clipping.
        grad_norm: the norm over the finite ones, a scalar.
    """
    own_K = torch.stack([get_total_norm([adapter_F.grad]) for adapter_F in adapters])  # pyright: ignore
    skip_non_finite(optimizer.param_groups, own_K)
    norm_K = gather_agents(own_K)
    grad_norm = joint_norm(norm_K)
    if max_grad_norm > 0:
        clip_grads_with_norm_(adapters, max_grad_norm, grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm_K, grad_norm
