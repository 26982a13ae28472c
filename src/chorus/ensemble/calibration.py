"""Weights and temperatures fitted on rows that are neither trained on nor scored."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from accelerate.utils import gather_object

from chorus.ensemble.distributions import Chunk, Chunks
from chorus.ensemble.lanes import Member
from chorus.ensemble.mixture import Mixture, dirichlet_weights, fit_temperatures, temperature_slope
from chorus.ensemble.next_token import Answerer

Observations = Literal["token", "sequence"]


class Calibrated(NamedTuple):
    """Answerers and the fitted temperature of each: 1 where there was nothing to fit it to."""

    answerers: list[Answerer]
    temperatures: list[float]


@torch.no_grad()
def fit_weights(
    chunks: Chunks, members: Sequence[Member], alpha: float, observations: Observations
) -> tuple[float, ...]:
    """The agents' weights by `dirichlet_weights`, from the chunks of all processes; a collective call.

    Args:
        members: of the chunks; None, the base, gets no weight.
        observations: what is one observation: a token, or all tokens of a row together.
    """
    agents = [index for index, member in enumerate(members) if member is not None]
    target_log_probs, rows = [torch.empty(len(agents), 0)], [torch.empty(0, dtype=torch.int64)]
    for log_prob_MNV, target_N, row_N in chunks():
        index_K1 = target_N.expand(len(members), -1)[:, :, None]
        target_log_probs.append(log_prob_MNV.gather(2, index_K1)[agents, :, 0].cpu())
        rows.append(row_N)
    log_prob_KN, row_N = torch.cat(target_log_probs, 1).double(), torch.cat(rows)
    if observations == "sequence":
        _, place_N = row_N.unique(return_inverse=True)
        count = int(place_N.max()) + 1 if len(place_N) else 0
        log_prob_KN = torch.zeros(len(agents), count, dtype=torch.float64).index_add_(1, place_N, log_prob_KN)
    of_all = torch.cat(gather_object([log_prob_KN]), 1)
    return tuple(dirichlet_weights(of_all, alpha).tolist())


@torch.no_grad()
def calibrate(chunks: Chunks, members: Sequence[Member], answerers: Sequence[Answerer]) -> Calibrated:
    """Fit one temperature to each answerer, to the outcomes of all processes; a collective call."""
    if not sum(gather_object([sum(len(chunk.target_N) for chunk in chunks())])):
        return Calibrated(list(answerers), [1.0] * len(answerers))

    def slopes(betas: list[float]) -> list[tuple[float, float]]:
        sums = torch.zeros(len(answerers), 2, dtype=torch.float64)
        for chunk in chunks():
            found = [_slope(chunk, members, one, beta) for one, beta in zip(answerers, betas, strict=True)]
            sums += torch.tensor(found, dtype=torch.float64)
        of_all = torch.stack(gather_object([sums])).sum(0)
        return [(slope, curvature) for slope, curvature in of_all.tolist()]

    return Calibrated(list(answerers), fit_temperatures(slopes, len(answerers)))


def _slope(chunk: Chunk, members: Sequence[Member], answerer: Answerer, beta: float) -> tuple[float, float]:
    places = [list(members).index(member) for member in answerer.members]
    log_prob_NV = Mixture(answerer.weights).log_prob(chunk.log_prob_MNV[places])
    return temperature_slope(log_prob_NV, chunk.target_N, beta)
