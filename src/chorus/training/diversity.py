"""The diversity term: the sliced Wasserstein distance between agents, on clouds of hidden states or of
predicted distributions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.config.objective import Representation, Space
from chorus.data.batches import Batch
from chorus.model.base import Head
from chorus.seeding import derive_seed
from chorus.training.function_space import Directions, projected_probabilities


class SwdSettings(NamedTuple):
    """How the clouds are compared: number of slices, kind of points, space."""

    num_projections: int
    representation: Representation
    seed: int
    space: Space = "hidden"


def projections(
    hidden_KBTD: Tensor, batch: Batch, swd: SwdSettings, step: int, rows_per_process: int, head: Head | None
) -> tuple[Tensor, Tensor]:
    """Each agent's cloud, projected: projected_KNP in fp32, and valid_N as in `cloud`.

    Args:
        head: needed only in the space of probabilities, where points are sqrt(V) times a distribution.
    """
    if swd.space == "hidden":
        points_KNH, valid_N = cloud(hidden_KBTD, batch, swd.representation, rows_per_process)
        slices_HP = random_slices(points_KNH.shape[-1], swd.num_projections, swd.seed, step)
        if points_KNH.is_cuda:
            slices_HP = slices_HP.pin_memory()  # a copy that does not wait for the forward pass
        return points_KNH @ slices_HP.to(points_KNH.device, non_blocking=True), valid_N
    assert head is not None, "distributions are compared, and there is no head to predict them"
    places_SM = batch.points_SM
    if swd.representation == "last":
        places_SM = places_SM.amax(1, keepdim=True)
    points_KSMD, valid_SM = _at(hidden_KBTD, places_SM), places_SM >= 0
    directions = Directions(swd.num_projections, swd.seed, step)
    projected_QP = projected_probabilities(points_KSMD.flatten(0, 2), head, directions)
    projected_KSMP = projected_QP.unflatten(0, points_KSMD.shape[:3])
    if swd.representation == "mean":  # projecting is linear
        count_S1 = valid_SM.sum(1, keepdim=True)
        share_SM = valid_SM / count_S1.clamp(min=1)
        projected_KSMP = (projected_KSMP * share_SM[:, :, None]).sum(2, keepdim=True)
        valid_SM = count_S1 > 0
    return _padded(projected_KSMP, valid_SM, rows_per_process)


def cloud(
    hidden_KBTD: Tensor, batch: Batch, representation: Representation, rows_per_process: int
) -> tuple[Tensor, Tensor]:
    """Each agent's cloud of RMS-normalised hidden states, and which of its points are valid.

    Returns:
        points_KNH: fp32, N = rows_per_process times the points of a sample; every point has norm sqrt(D), so
            that the distance between clouds is bounded by construction.
        valid_N: bool, the same for every agent; padding points are False.
    """
    B, T = batch.input_BT.shape
    S = len(batch.points_SM)
    if representation == "mean":
        number_S1 = torch.arange(S, device=hidden_KBTD.device)[:, None]
        sample_N = number_S1.expand(B, T).flatten() if batch.sample_BT is None else batch.sample_BT.flatten()
        weight_SN = ((sample_N == number_S1) & batch.mask_BT.flatten()).float()
        valid_SM = weight_SN.any(1, keepdim=True)
        weight_SN = weight_SN / weight_SN.sum(1, keepdim=True).clamp(min=1)
        points_KSMD = torch.einsum("knd,sn->ksd", hidden_KBTD.flatten(1, 2).float(), weight_SN)[:, :, None]
    else:
        places_SM = batch.points_SM
        if representation == "last":
            places_SM = places_SM.amax(1, keepdim=True)
        valid_SM = places_SM >= 0
        points_KSMD = _at(hidden_KBTD, places_SM).float()
    points_KSMD = points_KSMD * torch.rsqrt(points_KSMD.square().mean(-1, keepdim=True) + 1e-6)
    return _padded(points_KSMD, valid_SM, rows_per_process)


def _at(hidden_KBTD: Tensor, places_SM: Tensor) -> Tensor:
    """The hidden states at these places, points_KSMD; arbitrary where a place is -1."""
    K, D = len(hidden_KBTD), hidden_KBTD.shape[-1]
    index_KND = places_SM.clamp(min=0).flatten()[None, :, None].expand(K, -1, D)
    return hidden_KBTD.flatten(1, 2).gather(1, index_KND).unflatten(1, places_SM.shape)


def _padded(points_KSMX: Tensor, valid_SM: Tensor, rows_per_process: int) -> tuple[Tensor, Tensor]:
    """points_KNX and valid_N, padded with invalid points for missing rows."""
    missing = rows_per_process - len(valid_SM)
    assert missing >= 0, "more samples than every process makes room for"
    points_KSMX = torch.nn.functional.pad(points_KSMX, (0, 0, 0, 0, 0, missing))
    valid_SM = torch.nn.functional.pad(valid_SM, (0, 0, 0, missing))
    return points_KSMX.flatten(1, 2), valid_SM.flatten()


def random_slices(width: int, num_projections: int, seed: int, step: int) -> Tensor:
    """Unit directions slices_HP, fp32, the same on every
    process; drawn on the CPU so that no device differs."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "slices", step))
    normal_HP = torch.randn(width, num_projections, generator=generator)
    return normal_HP / normal_HP.norm(dim=0)


def sliced_wasserstein(
    projected_KPN: Tensor, valid_N: Tensor, gather_agents: Callable[[Tensor], Tensor] = lambda own: own
) -> Tensor:
    """Mean over pairs of agents of the squared sliced 2-Wasserstein distance (Bonneel et al. 2015, eq. 9,
    squared).

    On a line the optimal transport pairs points in sorted order, and the mean over pairs of squared
    differences is twice the unbiased variance: every agent is sorted once, and no pair is formed. The squared
    distance has a zero gradient where agents agree; its root has no gradient there. An agent with a
    non-finite point is excluded: its pairs count as 0 and give no gradient, the other pairs are unchanged.

    Args:
        projected_KPN: fp32 projections of each agent's points. Invalid points may hold anything.
        valid_N: bool, the same for all agents.
        gather_agents: where agents are spread over processes, gathers the rows of all agents. Every process
            sorts its own agents and compares all: sorted projections are sent once.

    Returns:
        A scalar >= 0; 0 with a zero gradient when no point is valid. Needs K >= 2.
    """
    last = torch.finfo(
        projected_KPN.dtype
    ).max  # invalid points sort after all valid ones, for every agent alike
    sorted_KPN = gather_agents(projected_KPN.masked_fill(~valid_N, last).sort(dim=-1).values)
    num_valid = valid_N.sum()
    is_real_N = torch.arange(valid_N.numel(), device=valid_N.device) < num_valid
    is_sound_K11 = sorted_KPN.isfinite().all(dim=(1, 2), keepdim=True)
    sorted_KPN = torch.where(is_sound_K11, sorted_KPN, 0.0)
    # A variance is shift-invariant; relative to agent 0, agents that agree are exactly zero.
    from_first_KPN = (sorted_KPN - sorted_KPN[0].detach()).masked_fill(~is_real_N, 0.0)
    # An agent at the mean of the others adds nothing to the squared deviations.
    num_sound = is_sound_K11.sum()
    mean_PN = (from_first_KPN.detach() * is_sound_K11).sum(0) / num_sound.clamp(min=1)
    variance_PN = torch.where(is_sound_K11, from_first_KPN, mean_PN).var(dim=0, correction=1)
    share_of_pairs = num_sound / len(sorted_KPN)  # the sum over pairs is K times that of squared differences
    return 2 * share_of_pairs * variance_PN.sum() / (num_valid.clamp(min=1) * projected_KPN.shape[1])
