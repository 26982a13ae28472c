"""Bootstrap weights: every agent has its own weights on the rows of the shared batch, the same in each epoch.

Poisson(1) counts are the bootstrap (Efron 1979) for rows that arrive one by one (Oza & Russell 2001).
Exponential(1) weights are the Bayesian bootstrap (Rubin 1981): divided by their sum they are a draw from the
flat Dirichlet distribution.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from chorus.errors import InputError
from chorus.seeding import derive_seed

Bootstrap = Literal["poisson", "bayesian"]


def bootstrap_weights(kind: Bootstrap, seed: int, agents: Sequence[int], num_targets_N: Tensor) -> Tensor:
    """Each agent's weight on each training row, a function of the seed, the agent and the row's place in the
    data.

    An agent's weights are divided by their mean over the target tokens of all rows. So over an epoch its loss
    is the weighted token mean, sum_r w_r NLL_r / sum_r w_r n_r, and every agent learns at the same rate.

    Args:
        num_targets_N: target tokens n_r of each training row.

    Returns:
        weight_KN: fp32, in the order of `agents`. It takes 4 bytes a row and agent on the host of each
            process, 64 MB for a million rows and 16 agents: too little for the memory forecast.

    Raises:
        InputError: an agent has no row with a weight above 0, which Poisson counts may cause with few rows.
    """
    weight_KN = torch.empty(len(agents), len(num_targets_N))
    for own_N, agent in zip(weight_KN, agents, strict=True):
        # On the CPU and without `exponential_`, so that no machine draws other numbers.
        generator = torch.Generator().manual_seed(derive_seed(seed, "bootstrap", agent))
        if kind == "poisson":
            one_N = torch.ones(len(num_targets_N), dtype=torch.float64)
            weight_N = torch.poisson(one_N, generator=generator)
        else:
            uniform_N = torch.rand(len(num_targets_N), dtype=torch.float64, generator=generator)
            weight_N = -torch.log1p(-uniform_N)
        mean = (weight_N * num_targets_N).sum() / num_targets_N.sum()
        if mean == 0:
            raise InputError(
                f"key 'bootstrap': poisson leaves agent {agent} none of the {len(num_targets_N)} training "
                "rows; set it to bayesian"
            )
        own_N.copy_(weight_N / mean)
    return weight_KN
