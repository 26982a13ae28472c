"""What is minimised, from hidden states: objective = K · (mean_k CE_k − lambda · R_SW).

The factor K makes lambda 0 the same as K independent runs. CE_k is a mean over the target tokens of a whole
optimiser step (all processes, all micro-batches). R_SW is the mean over pairs of agents of the squared sliced
2-Wasserstein distance between their clouds of hidden states.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.config.objective import ObjectiveSettings
from chorus.config.training import TrainingSettings
from chorus.data.batches import Batch
from chorus.mesh import Mesh
from chorus.spans import span
from chorus.training.diversity import SwdSettings, cloud, random_slices, sliced_wasserstein


class Objective(NamedTuple):
    """One micro-batch's share of an optimiser step's objective, on this process.

    Attributes:
        share: scalar to run backward from. Shares of all micro-batches and processes sum to the objective.
        nll_K: summed NLL of each agent over this process's target tokens, nats, detached.
        swd: R_SW of this micro-batch over all processes, detached; None when lambda is 0.
    """

    share: Tensor
    nll_K: Tensor
    swd: Tensor | None


def objective(
    nll_KBT: Tensor,
    hidden_KBTD: Tensor,
    batch: Batch,
    *,
    num_targets: int,
    num_micro_batches: int,
    lambda_sw: float,
    swd: SwdSettings,
    step: int,
    rows_per_process: int,
    gather: Callable[[Tensor], Tensor],
    agent_size: int = 1,
    gather_agents: Callable[[Tensor], Tensor] = lambda own: own,
) -> Objective:
    """A micro-batch's share of K · (mean_k CE_k − lambda · R_SW), for the agents of this process.

    Args:
        nll_KBT: fp32 token NLL, nats, 0 where no loss is due.
        hidden_KBTD: hidden states after the final norm.
        num_targets: target tokens of the optimiser step, over all processes and micro-batches.
        num_micro_batches: of the optimiser step; R_SW is averaged over them.
        rows_per_process: S is padded to it, so that every process gathers the same shape.
        gather: concatenates a tensor's first axis over the processes with other rows; only the own slice
            carries a gradient.
        agent_size, gather_agents: over how many processes the agents are spread, and what concatenates the
            first axis over them in the same way. Each process has the same number of agents.
    """
    nll_K = nll_KBT.sum((1, 2))
    is_sound_K = nll_K.isfinite()
    # A non-finite loss makes its agent's whole gradient NaN, which every process sees when gradients are
    # reduced.
    task = (nll_K * torch.where(is_sound_K, 1.0, math.nan)).sum() / num_targets
    if lambda_sw == 0:
        return Objective(task, nll_K.detach(), None)
    with span("swd_loss"):
        points_KNH, valid_N = cloud(hidden_KBTD, batch, swd.representation, rows_per_process)
        points_KNH = torch.where(
            is_sound_K[:, None, None], points_KNH, math.nan
        )  # so that other processes see it
        slices_HP = random_slices(points_KNH.shape[-1], swd.num_projections, swd.seed, step)
        if points_KNH.is_cuda:
            slices_HP = slices_HP.pin_memory()  # copied without waiting for the forward
        slices_HP = slices_HP.to(points_KNH.device, non_blocking=True)
        projected_NKP = gather((points_KNH @ slices_HP).transpose(0, 1).contiguous())
        distance = sliced_wasserstein(projected_NKP.movedim(0, -1), gather(valid_N), gather_agents)
    num_agents = nll_KBT.shape[0] * agent_size
    share = task - num_agents * lambda_sw * distance / num_micro_batches
    return Objective(share, nll_K.detach(), distance.detach())


def objective_of(settings: ObjectiveSettings, training: TrainingSettings, mesh: Mesh) -> partial[Objective]:
    """`objective` with the arguments that are the same for a whole run: output, batch, num_targets and step
    remain."""
    return partial(
        objective,
        num_micro_batches=training.gradient_accumulation_steps,
        lambda_sw=settings.lambda_sw,
        swd=SwdSettings(settings.swd_num_projections, settings.swd_representation, training.seed),
        rows_per_process=training.batch_size,
        gather=mesh.gather_rows,
        agent_size=mesh.agent_size,
        gather_agents=mesh.gather_agents,
    )
