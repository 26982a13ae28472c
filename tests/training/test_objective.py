"""The objective against POT, float64 closed forms, and itself split over processes."""

import math
from dataclasses import dataclass, field

import ot
import pytest
import torch
from torch import Tensor
from toy import max_difference, toy_batch

from chorus.config import Config
from chorus.data.batches import Sample, collate
from chorus.mesh import Mesh
from chorus.training.diversity import SwdSettings, cloud, random_slices, sliced_wasserstein
from chorus.training.objective import objective, objective_of

SWD = SwdSettings(num_projections=40, representation="tokens", seed=0)


def clouds(num_agents: int, points: int, width: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_agents, points, width, generator=generator)
        + torch.arange(num_agents)[:, None, None] / 2
    )


def swd_of(points_KNH: Tensor, slices_HP: Tensor, valid_N: Tensor | None = None) -> Tensor:
    valid_N = torch.ones(points_KNH.shape[1], dtype=torch.bool) if valid_N is None else valid_N
    return sliced_wasserstein((points_KNH @ slices_HP).transpose(1, 2), valid_N)


@pytest.mark.parametrize("num_agents", [2, 5])
def test_it_is_the_mean_over_pairs_of_pots_squared_sliced_distance_on_shared_slices(num_agents: int):
    points_KNH, slices_HP = clouds(num_agents, 33), random_slices(6, 40, seed=0, step=1)
    pairs = [
        ot.sliced_wasserstein_distance(
            points_KNH[i].numpy(), points_KNH[j].numpy(), projections=slices_HP.numpy()
        )
        ** 2
        for i in range(num_agents)
        for j in range(i)
    ]
    assert swd_of(points_KNH, slices_HP).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_points_that_are_not_valid_count_for_nothing_whatever_they_hold():
    points_KNH, slices_HP = clouds(3, 20), random_slices(6, 8, 0, 0)
    valid_N = torch.arange(20) % 3 != 1
    garbage = torch.where(valid_N[:, None], points_KNH, torch.tensor(1e6))
    assert swd_of(garbage, slices_HP, valid_N).item() == pytest.approx(
        swd_of(points_KNH[:, valid_N], slices_HP).item()
    )
    assert swd_of(garbage, slices_HP, torch.zeros(20, dtype=torch.bool)).item() == 0


def test_agents_that_agree_are_at_distance_zero_with_a_zero_gradient():
    points_KNH = clouds(1, 20).repeat(3, 1, 1).requires_grad_()
    distance = swd_of(points_KNH, random_slices(6, 8, 0, 0))
    distance.backward()
    assert distance.item() == 0
    assert points_KNH.grad is not None
    assert bool((points_KNH.grad == 0).all())


@pytest.mark.parametrize("broken", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_agent_that_is_no_number_takes_its_pairs_out_and_leaves_the_others_theirs(
    broken: int, value: float
):
    points_KNH, slices_HP = clouds(4, 12).double(), random_slices(6, 5, 0, 0).double()
    sound = [k for k in range(4) if k != broken]
    reference = points_KNH.clone().requires_grad_()
    sorted_KNP = (reference @ slices_HP).sort(dim=1).values
    pairs = [(sorted_KNP[i] - sorted_KNP[j]).square().mean() for i in sound for j in sound if j < i]
    (sum(pairs) / 6).backward()  # pyright: ignore
    points_KNH[broken, 5] = value
    points_KNH.requires_grad_()
    distance = swd_of(points_KNH, slices_HP)
    distance.backward()
    assert points_KNH.grad is not None
    assert reference.grad is not None
    assert distance.item() == pytest.approx(sum(pairs).item() / 6)  # pyright: ignore
    assert max_difference(points_KNH.grad[sound], reference.grad[sound]) < 1e-12
    assert swd_of(torch.full_like(points_KNH, value), slices_HP).item() == 0


def test_its_gradient_is_that_of_float64_finite_differences():
    points_KNH = clouds(3, 7).double().requires_grad_()
    slices_HP = random_slices(6, 8, 0, 0).double()
    assert torch.autograd.gradcheck(lambda points: swd_of(points, slices_HP), (points_KNH,))


def test_slices_are_unit_vectors_that_depend_on_seed_and_step_alone():
    slices_HP = random_slices(50, 9, seed=3, step=4)
    assert torch.allclose(slices_HP.norm(dim=0), torch.ones(9))
    assert torch.equal(slices_HP, random_slices(50, 9, seed=3, step=4))
    assert not torch.equal(slices_HP, random_slices(50, 9, seed=3, step=5))


@pytest.mark.parametrize("representation", ["tokens", "mean", "last"])
def test_the_reward_is_bounded_by_construction(representation):
    """Points lie on a sphere of radius sqrt(D): opposite clouds, of
    any scale, are at 4 on average over directions."""
    batch = toy_batch(rows=8)
    hidden_BTD = 1e4 * torch.nn.functional.normalize(torch.randn(1, 1, 64), dim=-1).expand(8, 10, 64)
    points_KNH, valid_N = cloud(torch.stack([hidden_BTD, -hidden_BTD]), batch, representation, 8)
    distance = swd_of(points_KNH, random_slices(64, 4_000, 0, 0), valid_N).item()
    assert distance == pytest.approx(4, rel=0.1)
    assert torch.allclose(points_KNH[:, valid_N].norm(dim=-1), torch.tensor(8.0))


def test_mean_and_last_are_the_mean_and_the_last_of_a_rows_targets():
    batch, hidden_KBTD = toy_batch(rows=3, without_targets=None), torch.randn(2, 3, 10, 5)
    mean_KNH, _ = cloud(hidden_KBTD, batch, "mean", 3)
    last_KNH, _ = cloud(hidden_KBTD, batch, "last", 3)
    for row in range(3):
        targets_KND = hidden_KBTD[:, row, batch.mask_BT[row]]
        for found, expected in (
            (mean_KNH[:, row], targets_KND.mean(1)),
            (last_KNH[:, row], targets_KND[:, -1]),
        ):
            rms = expected.square().mean(-1, keepdim=True).sqrt()
            assert max_difference(found, expected / rms) < 1e-4


def test_lambda_zero_is_the_sum_of_the_agents_own_losses_and_costs_no_distance():
    nll_KBT, hidden_KBTD = torch.rand(3, 4, 10), torch.full((3, 4, 10, 5), math.nan)
    part = loss_fn(nll_KBT, hidden_KBTD, toy_batch(), lambda_sw=0.0)
    assert part.swd is None
    assert part.share.item() == pytest.approx(nll_KBT.sum().item() / 20)


def test_it_is_k_times_the_mean_loss_less_lambda_times_the_distance():
    nll_KBT, hidden_KBTD, batch = torch.rand(3, 4, 10), torch.randn(3, 4, 10, 5), toy_batch()
    part = loss_fn(nll_KBT, hidden_KBTD, batch, lambda_sw=0.7)
    points_KNH, valid_N = cloud(hidden_KBTD, batch, "tokens", 4)
    distance = swd_of(points_KNH, random_slices(5, 40, 0, 2), valid_N)
    ce_K = nll_KBT.sum((1, 2)) / 20
    assert part.share.item() == pytest.approx(3 * (ce_K.mean() - 0.7 * distance).item(), rel=1e-5)
    assert part.swd == distance


@pytest.mark.parametrize("is_packed", [False, True])
def test_weights_multiply_the_loss_of_a_samples_tokens_and_leave_the_distance_as_it_is(is_packed: bool):
    nll_KBT, hidden_KBTD, batch = torch.rand(3, 4, 10), torch.randn(3, 4, 10, 5), toy_batch()
    sample_BT = torch.arange(4)[:, None].expand(4, 10)
    if is_packed:  # a sample is half a row of an agent, and the last half is padding
        sample_BT = torch.arange(8).repeat_interleave(5).view(4, 10)
        sample_BT[3, 5:] = -1
        nll_KBT[:, 3, 5:] = 0
        batch = batch._replace(sample_BT=sample_BT)
    weight_KS = torch.rand(3, 8 if is_packed else 4)
    plain = loss_fn(nll_KBT, hidden_KBTD, batch, lambda_sw=0.7)
    part = loss_fn(nll_KBT, hidden_KBTD, batch._replace(weight_KS=weight_KS), lambda_sw=0.7)
    expected_K = [
        sum(float(weight * nll_BT[sample_BT == s].sum()) for s, weight in enumerate(weight_S))
        for nll_BT, weight_S in zip(nll_KBT, weight_KS, strict=True)
    ]
    assert part.nll_K.tolist() == pytest.approx(expected_K)
    assert part.swd == plain.swd
    assert part.share.item() == pytest.approx(sum(expected_K) / 20 - 3 * 0.7 * float(part.swd), abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_makes_its_agents_gradient_none_and_no_other_ones(value: float):
    nll_KBT, hidden_KBTD, batch = torch.rand(3, 4, 10), torch.randn(3, 4, 10, 5), toy_batch()
    nll_KBT[1, 0, 3] = value
    nll_KBT.requires_grad_()
    hidden_KBTD.requires_grad_()
    loss_fn(nll_KBT, hidden_KBTD, batch, lambda_sw=0.7).share.backward()
    for gradient in (nll_KBT.grad, hidden_KBTD.grad):
        assert gradient is not None
        assert gradient.flatten(1).isfinite().all(1).tolist()[::2] == [True, True]
    assert nll_KBT.grad is not None
    assert bool(nll_KBT.grad[1].isnan().all())
    pair = loss_fn(nll_KBT[::2], hidden_KBTD[::2], batch, lambda_sw=0.7 * 3 / 3 / 2)
    ours, (theirs,) = hidden_KBTD.grad, torch.autograd.grad(pair.share, [hidden_KBTD])
    assert ours is not None
    assert max_difference(ours[::2], theirs[::2]) < 1e-5


def test_a_configuration_says_how_agents_are_compared_and_how_much_a_micro_batch_is_of_its_step():
    swd = {"lambda_sw": 0.7, "swd_num_projections": 7, "swd_representation": "last", "seed": 5}
    config = Config(num_agents=3, batch_size=6, gradient_accumulation_steps=4, **swd)
    batch = toy_batch(rows=4, length=9)
    nll_KBT, hidden_KBTD = torch.rand(3, *batch.input_BT.shape), torch.randn(3, *batch.input_BT.shape, 6)
    mesh = Collected()
    part = objective_of(config, config, mesh)(nll_KBT, hidden_KBTD, batch, num_targets=20, step=2)
    points_KNH, valid_N = cloud(hidden_KBTD, batch, "last", 6)
    distance = swd_of(points_KNH, random_slices(6, 7, seed=5, step=2), valid_N)
    assert part.swd is not None
    assert part.swd.item() == pytest.approx(distance.item(), rel=1e-5)
    assert part.share.item() == pytest.approx((nll_KBT.sum() / 20 - 3 * 0.7 * distance / 4).item(), rel=1e-5)
    assert [len(own) for own in mesh.into] == [6, 6]  # rows of a process, one point each


def loss_fn(
    nll_KBT: Tensor, hidden_KBTD: Tensor, batch, lambda_sw: float, gather=lambda own: own, rows: int = 4
):
    return objective(
        nll_KBT,
        hidden_KBTD,
        batch,
        num_targets=20,
        num_micro_batches=1,
        lambda_sw=lambda_sw,
        swd=SWD,
        step=2,
        rows_per_process=rows,
        gather=gather,
    )


def test_shares_of_two_processes_of_unequal_rows_sum_to_the_whole_and_so_do_their_gradients():
    """Two processes played one after the other: each holds its
    own rows and is given the other's projections."""
    rows = [
        Sample(torch.arange(3, 3 + n), torch.tensor([False] * 2 + [True] * (n - 2))) for n in (9, 6, 8, 7, 5)
    ]
    whole, hidden = collate(rows, 0, points_per_row=3), torch.randn(3, 5, 8, 6, requires_grad=True)
    nll = torch.rand(3, 5, 8)
    expected = loss_fn(nll, hidden, whole, lambda_sw=0.7, rows=6)
    (expected_gradient,) = torch.autograd.grad(expected.share, hidden)
    # All of a batch are the last two rows of the second process short.
    parts = [
        (collate(rows[:3], 0, points_per_row=3), slice(0, 3)),
        (collate(rows[3:], 0, points_per_row=3), slice(3, 5)),
    ]
    kept: dict[int, list[Tensor]] = {0: [], 1: []}
    for rank, (batch, place) in enumerate(parts):
        T = batch.input_BT.shape[1]
        loss_fn(
            nll[:, place, :T],
            hidden[:, place, :T],
            batch,
            0.7,
            rows=3,
            gather=Collected(into=kept[rank]).gather_rows,
        )
    total, gradient = 0.0, torch.zeros_like(hidden)
    for rank, (batch, place) in enumerate(parts):
        T = batch.input_BT.shape[1]
        joined = join(kept, rank)
        part = loss_fn(
            nll[:, place, :T] * batch.mask_BT, hidden[:, place, :T], batch, 0.7, rows=3, gather=joined
        )
        assert part.swd is not None
        assert expected.swd is not None
        assert part.swd.item() == pytest.approx(expected.swd.item(), rel=1e-5)
        gradient += torch.autograd.grad(part.share, hidden)[0]
        total += part.nll_K.sum().item() / 20
    assert max_difference(gradient, expected_gradient) < 1e-5
    assert total == pytest.approx((nll * whole.mask_BT).sum().item() / 20, rel=1e-5)


@dataclass(frozen=True)
class Collected(Mesh):
    """A process alone that keeps what it would send."""

    into: list[Tensor] = field(default_factory=list)

    def gather_rows(self, own: Tensor) -> Tensor:
        self.into.append(own.detach())
        return own


def join(kept: dict[int, list[Tensor]], rank: int):
    """What a process receives: everybody's tensors, its own with a gradient."""
    calls = iter(range(2))

    def gather(own: Tensor) -> Tensor:
        call = next(calls)
        return torch.cat([own if other == rank else kept[other][call] for other in (0, 1)])

    return gather
