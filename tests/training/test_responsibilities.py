"""Responsibilities against the explicit objective in float64 and its gradient by autograd."""

import math

import pytest
import torch
from torch import Tensor
from toy import max_difference, toy_batch, toy_samples

from chorus.data.batches import Batch, collate
from chorus.training.diversity import SwdSettings
from chorus.training.objective import Objective, objective
from chorus.training.responsibilities import Responsibilities

TARGETS = 20


def padded() -> Batch:
    return toy_batch()


def packed() -> Batch:
    return collate(toy_samples(6), 0, points_per_row=3, packing=20)


def nll_of(num_agents: int, batch: Batch, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    nll_KBT = scale * torch.rand(num_agents, *batch.input_BT.shape, generator=generator)
    return (nll_KBT * batch.mask_BT).requires_grad_()


def part_of(
    nll_KBT: Tensor, batch: Batch, settings: Responsibilities | None, gather_agents=lambda own: own
) -> Objective:
    return objective(
        nll_KBT,
        torch.zeros(*nll_KBT.shape, 2),
        batch,
        num_targets=TARGETS,
        num_micro_batches=1,
        lambda_sw=0.0,
        swd=SwdSettings(5, "tokens", 0),
        step=0,
        rows_per_process=6,
        gather=lambda own: own,
        gather_agents=gather_agents,
        responsibilities=settings,
    )


def explicit(nll_KBT: Tensor, batch: Batch, alpha: float, floor: float) -> Tensor:
    """(1-f) · L_a + f · mean, over the samples one by one, in nats."""
    total = nll_KBT.new_zeros(())
    B, T = batch.input_BT.shape
    number_BT = torch.arange(B)[:, None].expand(B, T) if batch.sample_BT is None else batch.sample_BT
    for sample in range(len(batch.points_SM)):
        loss_K = nll_KBT[:, number_BT == sample].sum(1)
        renyi = -torch.log(torch.exp(-(1 - alpha) * loss_K).mean()) / (1 - alpha)
        total = total + (1 - floor) * renyi + floor * loss_K.mean()
    return total


@pytest.mark.parametrize("make", [padded, packed])
@pytest.mark.parametrize(("alpha", "floor"), [(0.0, 0.0), (0.0, 0.1), (0.5, 0.25), (0.9, 0.0)])
@pytest.mark.parametrize("num_agents", [1, 3])
def test_the_objective_is_k_times_the_explicit_one_and_so_is_its_gradient(
    num_agents: int, alpha: float, floor: float, make
):
    batch = make()
    nll_KBT = nll_of(num_agents, batch)
    part = part_of(nll_KBT, batch, Responsibilities(alpha, floor))
    (found,) = torch.autograd.grad(part.share, nll_KBT)
    exact = nll_KBT.detach().double().requires_grad_()
    expected = explicit(exact, batch, alpha, floor)
    (gradient,) = torch.autograd.grad(num_agents * expected / TARGETS, exact)
    assert part.shared_nll is not None
    assert part.shared_nll.item() == pytest.approx(expected.item(), rel=1e-5)
    assert max_difference(found * batch.mask_BT, gradient * batch.mask_BT) < 1e-5
    assert torch.allclose(part.nll_K, nll_KBT.sum((1, 2)).detach()), "each agent's own loss is still reported"


def test_alpha_0_without_a_floor_is_the_negative_log_likelihood_of_the_mixture():
    batch = padded()
    nll_KBT = nll_of(4, batch)
    part = part_of(nll_KBT, batch, Responsibilities(0.0, 0.0))
    probability_B = nll_KBT.detach().double().sum(2).neg().exp().mean(0)
    assert part.shared_nll is not None
    assert part.shared_nll.item() == pytest.approx(-probability_B.log().sum().item(), rel=1e-5)


def test_alpha_towards_1_is_the_mean_of_the_agents_own_losses():
    batch = padded()
    nll_KBT = nll_of(4, batch)
    (near,) = torch.autograd.grad(part_of(nll_KBT, batch, Responsibilities(1 - 1e-6, 0.0)).share, nll_KBT)
    (own,) = torch.autograd.grad(part_of(nll_KBT, batch, None).share, nll_KBT)
    assert max_difference(near, own) < 1e-4


def test_the_floor_leaves_an_agent_that_is_behind_everywhere_its_share_and_without_it_the_agent_is_lost():
    batch = padded()
    nll_KBT = nll_of(3, batch).detach() + 40 * torch.tensor([0.0, 0.0, 1.0])[:, None, None] * batch.mask_BT
    nll_KBT.requires_grad_()
    for floor in (0.0, 0.1):
        (weight_KBT,) = torch.autograd.grad(
            part_of(nll_KBT, batch, Responsibilities(0.0, floor)).share * TARGETS, nll_KBT
        )
        on_targets_KN = weight_KBT[:, batch.mask_BT]
        assert on_targets_KN[2].max().item() == pytest.approx(floor, abs=1e-6)
        assert torch.allclose(on_targets_KN.mean(0), torch.tensor(1.0))
        assert bool((on_targets_KN >= floor - 1e-6).all())


def test_losses_of_hundreds_of_nats_overflow_nowhere():
    batch = padded()
    part = part_of(nll_of(3, batch, scale=1000), batch, Responsibilities(0.0, 0.0))
    assert math.isfinite(part.share.item())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("make", [padded, packed])
def test_an_agent_that_is_not_finite_leaves_the_others_the_weights_that_they_have_without_it(
    make, value: float
):
    batch = make()
    nll_KBT = nll_of(3, batch).detach()
    place = tuple(batch.mask_BT.nonzero()[0].tolist())
    nll_KBT[(1, *place)] = value
    nll_KBT.requires_grad_()
    settings = Responsibilities(0.2, 0.1)
    part = part_of(nll_KBT, batch, settings)
    (found,) = torch.autograd.grad(part.share, nll_KBT)
    sound = nll_KBT.detach()[::2].requires_grad_()
    two = part_of(sound, batch, settings)
    (expected,) = torch.autograd.grad(two.share, sound)
    assert max_difference(found[::2], expected) < 1e-6
    assert bool(found[1].isnan().any())
    assert part.shared_nll is not None
    assert part.shared_nll.item() == pytest.approx(two.shared_nll.item(), rel=1e-5)  # pyright: ignore


def test_agents_over_processes_are_weighted_by_the_losses_of_all():
    """Two processes played one after the other, each given the other's losses."""
    batch = padded()
    nll_KBT = nll_of(4, batch)
    settings = Responsibilities(0.3, 0.1)
    whole = part_of(nll_KBT, batch, settings)
    (expected,) = torch.autograd.grad(whole.share, nll_KBT)
    sent: list[Tensor] = []
    for half in (slice(0, 2), slice(2, 4)):
        part_of(nll_KBT[half], batch, settings, lambda own: sent.append(own) or own)
    for rank, half in enumerate((slice(0, 2), slice(2, 4))):
        own = nll_KBT.detach()[half].requires_grad_()

        def gather(mine: Tensor, rank: int = rank) -> Tensor:
            return torch.cat([mine if other == rank else sent[other] for other in (0, 1)])

        part = part_of(own, batch, settings, gather)
        (found,) = torch.autograd.grad(part.share, own)
        assert max_difference(found, expected[half]) < 1e-6
        assert part.shared_nll == whole.shared_nll
