"""What is minimised, from hidden states: objective = K · (mean_k CE_k − lambda · R_SW).

With `responsibility_alpha` below 1 the mean of the losses gives way to responsibilities.

The factor K makes lambda 0 the same as K independent runs. CE_k is a mean over the target tokens of a whole
optimiser step (all processes, all micro-batches). R_SW is the mean over pairs of agents of the squared sliced
2-Wasserstein distance between their clouds of hidden states.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chorus.config.objective import ObjectiveSettings
from chorus.config.training import TrainingSettings
from chorus.data.batches import Batch
from chorus.mesh import Mesh
from chorus.model.base import Head
from chorus.spans import span
from chorus.training.diversity import SwdSettings, projections, sliced_wasserstein
from chorus.training.responsibilities import Responsibilities, row_weights


class Objective(NamedTuple):
    """One micro-batch's share of an optimiser step's objective, on this process.

    Attributes:
        share: scalar to run backward from. Shares of all micro-batches and processes sum to the objective.
        nll_K: summed NLL of each agent over this process's target tokens, weighted, nats, detached.
        swd: R_SW of this micro-batch over all processes, detached; None when lambda is 0.
        shared_nll: the loss under responsibilities, which replaces the mean over agents of `nll_K`; None when
            alpha is 1.
    """

    share: Tensor
    nll_K: Tensor
    swd: Tensor | None
    shared_nll: Tensor | None = None


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
    head: Head | None = None,
    responsibilities: Responsibilities | None = None,
) -> Objective:
    """A micro-batch's share of K · (mean_k CE_k − lambda · R_SW), for the agents of this process.

    Args:
        nll_KBT: fp32 token NLL, nats, 0 where no loss is due.
        hidden_KBTD: hidden states after the final norm.
        batch: its weight_KS multiply the NLL, and nothing else.
        num_targets: target tokens of the optimiser step, over all processes and micro-batches.
        num_micro_batches: of the optimiser step; R_SW is averaged over them.
        rows_per_process: S is padded to it, so that every process gathers the same shape.
        gather: concatenates tensors of the processes with other rows along the first axis; only the own slice
            carries a gradient.
        agent_size, gather_agents: the number of processes over which the agents are spread, and the same
            concatenation over them. Each process has the same number of agents.
        head: needed only where predicted distributions are compared.
        responsibilities: None: alpha is 1, each agent has its own loss on every row.
    """
    nll_KBT = weighted(nll_KBT, batch)
    nll_K = nll_KBT.sum((1, 2))
    is_sound_K = nll_K.isfinite()
    due_K, shared_nll = nll_K, None
    if responsibilities is not None:
        weight_KBT, shared_nll = row_weights(nll_KBT, batch, responsibilities, gather_agents)
        due_K = (nll_KBT * weight_KBT).sum((1, 2))
    # A non-finite loss makes its agent's whole gradient NaN, which every process sees when gradients are
    # reduced.
    task = (due_K * torch.where(is_sound_K, 1.0, math.nan)).sum() / num_targets
    if lambda_sw == 0:
        return Objective(task, nll_K.detach(), None, shared_nll)
    with span("swd_loss"):
        projected_KNP, valid_N = projections(hidden_KBTD, batch, swd, step, rows_per_process, head)
        # So that other processes see the non-finite loss.
        projected_KNP = torch.where(is_sound_K[:, None, None], projected_KNP, math.nan)
        projected_NKP = gather(projected_KNP.transpose(0, 1).contiguous())
        distance = sliced_wasserstein(projected_NKP.movedim(0, -1), gather(valid_N), gather_agents)
    num_agents = nll_KBT.shape[0] * agent_size
    share = task - num_agents * lambda_sw * distance / num_micro_batches
    return Objective(share, nll_K.detach(), distance.detach(), shared_nll)


def weighted(nll_KBT: Tensor, batch: Batch) -> Tensor:
    """The NLL of each token times the weight of its sample for the agent."""
    if batch.weight_KS is None:
        return nll_KBT
    if batch.sample_BT is None:
        return nll_KBT * batch.weight_KS[:, :, None]
    sample_KN = batch.sample_BT.view(batch.num_sets, -1).expand(len(nll_KBT), -1)
    return nll_KBT * batch.weight_KS.gather(1, sample_KN.clamp(min=0)).view_as(nll_KBT)


def objective_of(
    settings: ObjectiveSettings,
    training: TrainingSettings,
    mesh: Mesh,
    head: Head | None = None,
    lambda_at: Callable[[int], float] | None = None,
) -> Callable[..., Objective]:
    """`objective` with the arguments that are constant over a run, and lambda as a function of the step. The
    remaining arguments: output, batch, num_targets and step.

    Args:
        head: needed with `swd_space: probabilities`.
        lambda_at: None: lambda_sw at every step.
    """
    alpha, floor = settings.responsibility_alpha, settings.responsibility_floor
    fixed = partial(
        objective,
        num_micro_batches=training.gradient_accumulation_steps,
        swd=SwdSettings(
            settings.swd_num_projections, settings.swd_representation, training.seed, settings.swd_space
        ),
        rows_per_process=training.batch_size,
        gather=mesh.gather_rows,
        agent_size=mesh.agent_size,
        gather_agents=mesh.gather_agents,
        head=head,
        responsibilities=Responsibilities(alpha, floor) if alpha < 1 else None,
    )

    def of_step(*output_and_batch: Any, num_targets: int, step: int) -> Objective:
        lambda_sw = settings.lambda_sw if lambda_at is None else lambda_at(step)
        return fixed(*output_and_batch, num_targets=num_targets, step=step, lambda_sw=lambda_sw)

    return of_step
