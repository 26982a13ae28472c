"""Responsibilities: an objective between the agents' own losses and the loss of their mixture.

Soft Specialists (arXiv 2605.27747): with l_k the loss of agent k on an example, minimise

    L_a = -1/(1-a) · log mean_k exp(-(1-a) · l_k)

Its gradient is sum_k r_k · grad l_k with r = softmax_k(-(1-a) · l_k). For a towards 1 it is the mean of the
losses; for a = 0 it is the negative log-likelihood of the mixture. An example is a row (a sample, where rows
are packed) and l_k the sum over its target tokens, -log p_k(row).

On its own this can starve agents: one that is worse on every row gets no weight and never catches up. So the
mean has a fraction f: (1-f) · L_a + f · mean_k l_k, and K · r_k is never below f.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.data.batches import Batch


class Responsibilities(NamedTuple):
    """alpha: a, in [0, 1); floor: f, in [0, 1)."""

    alpha: float
    floor: float


class RowWeights(NamedTuple):
    """The responsibilities and the loss of a micro-batch.

    Attributes:
        weight_KBT: K · r of each token's row, for this process's agents. Their mean over all agents is 1.
        loss: the rows' (1-f) · L_a + f · mean_k l_k, summed, nats: of all agents.
    """

    weight_KBT: Tensor
    loss: Tensor


def row_weights(
    nll_KBT: Tensor, batch: Batch, settings: Responsibilities, gather_agents: Callable[[Tensor], Tensor]
) -> RowWeights:
    """The weight of each row for each agent, detached.

    An agent with a non-finite loss is excluded from the softmax: the others are weighted as without it.

    Args:
        nll_KBT: token NLL, nats, of this process's agents; 0 where no loss is due.
        gather_agents: where agents are spread over processes, gathers the losses of all agents.
    """
    nll_KBT = nll_KBT.detach()
    own_KS, sample_BT = nll_KBT.sum(2), None
    if batch.sample_BT is not None:  # packed; not scatter_add, whose order of summation is undefined on a GPU
        sample_BT = batch.sample_BT.clamp(min=0)  # padding has no loss, so any sample will do
        samples = range(len(batch.points_SM))
        own_KS = torch.stack([(nll_KBT * (sample_BT == s)).sum((1, 2)) for s in samples], 1)
    all_KS = gather_agents(own_KS)
    is_sound_K1 = all_KS.isfinite().all(1, keepdim=True)
    num_sound = is_sound_K1.sum()
    sharpness = 1 - settings.alpha
    log_sum_S = (-sharpness * all_KS).masked_fill(~is_sound_K1, -torch.inf).logsumexp(0)
    soft_KS = num_sound * (-sharpness * own_KS - log_sum_S).exp()
    weight_KS = settings.floor + (1 - settings.floor) * soft_KS
    mean_S = all_KS.masked_fill(~is_sound_K1, 0.0).sum(0) / num_sound
    renyi_S = (num_sound.log() - log_sum_S) / sharpness
    loss = ((1 - settings.floor) * renyi_S + settings.floor * mean_S).sum()
    weight_KBT = weight_KS[:, :, None] if sample_BT is None else weight_KS[:, sample_BT]
    return RowWeights(weight_KBT.expand_as(nll_KBT), loss)
