"""The distance between predicted distributions: POT on the explicit probabilities, float64, autograd."""

from math import sqrt
from typing import Any

import ot
import pytest
import torch
from torch import Tensor, nn
from toy import max_difference, toy_batch, toy_samples

from chorus.config.objective import Representation
from chorus.data.batches import Batch, collate
from chorus.model.base import Head
from chorus.training import function_space
from chorus.training.diversity import SwdSettings, projections
from chorus.training.function_space import Directions, projected_probabilities
from chorus.training.objective import Objective, objective

V, D, P = 31, 6, 40


def head_of(softcap: float | None = 3.0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        linear = nn.Linear(D, V).requires_grad_(False)
    return Head(linear.to(dtype), softcap, scale)


def explicit(hidden_XD: Tensor, head: Head) -> Tensor:
    """The probabilities, written out in float64."""
    z = hidden_XD.double() @ head.weight_VD.double().T + head.linear.bias.double()
    z = head.scale * z
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z.exp() / z.exp().sum(-1, keepdim=True)


def directions_VP(step: int = 2, seed: int = 0) -> Tensor:
    """All of them, of unit norm, in float64."""
    pieces = [slices for _, slices in Directions(P, seed, step).pieces(V, torch.device("cpu"))]
    return torch.cat(pieces, 1).double() / sqrt(V)


def hidden_of(num_agents: int, batch: Batch, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (num_agents, *batch.input_BT.shape, D)
    return (2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()


def part_of(hidden_KBTD: Tensor, batch: Batch, head: Head, representation: Representation) -> Objective:
    nll_KBT = torch.zeros(hidden_KBTD.shape[:3])
    return objective(
        nll_KBT,
        hidden_KBTD,
        batch,
        num_targets=20,
        num_micro_batches=1,
        lambda_sw=0.7,
        swd=SwdSettings(P, representation, 0, "probabilities"),
        step=2,
        rows_per_process=len(batch.points_SM) + 1,  # a row is missing: it counts for nothing
        gather=lambda own: own,
        head=head,
    )


def points_of(p_KBTV: Tensor, batch: Batch, representation: Representation) -> Tensor:
    """points_KNV: the cloud of each agent, row by row."""
    flat_KNV, points = p_KBTV.flatten(1, 2), []
    for places_M in batch.points_SM:
        own = flat_KNV[:, places_M[places_M >= 0]]
        if own.shape[1] == 0:
            continue
        chosen = {"tokens": own, "mean": own.mean(1, keepdim=True), "last": own[:, -1:]}
        points.append(chosen[representation])
    return torch.cat(points, 1)


def batches() -> dict[str, Batch]:
    return {
        "padded": toy_batch(),  # one of its rows has no target
        "packed": collate(toy_samples(5), 0, points_per_row=3, packing=20),
    }


@pytest.mark.parametrize("layout", batches())
@pytest.mark.parametrize("representation", ["tokens", "mean", "last"])
@pytest.mark.parametrize("num_agents", [2, 4])
def test_it_is_the_mean_over_pairs_of_pots_squared_sliced_distance_between_explicit_probabilities(
    num_agents: int, representation: Representation, layout: str
):
    batch, head = batches()[layout], head_of()
    hidden_KBTD = hidden_of(num_agents, batch)
    part = part_of(hidden_KBTD, batch, head, representation)
    points_KNV = sqrt(V) * points_of(explicit(hidden_KBTD.detach(), head), batch, representation).numpy()
    slices_VP = directions_VP().numpy()
    pairs = [
        ot.sliced_wasserstein_distance(points_KNV[i], points_KNV[j], projections=slices_VP) ** 2
        for i in range(num_agents)
        for j in range(i)
    ]
    assert part.swd is not None
    assert part.swd.item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


@pytest.mark.parametrize("chunk", [None, 3 * V + 1])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_its_gradient_is_that_of_autograd_through_the_explicit_formula(
    softcap: float | None, scale: float, chunk: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Also with logits and directions cut into pieces, of which the last ones are smaller."""
    if chunk is not None:
        monkeypatch.setattr(function_space, "CHUNK_ELEMENTS", chunk)
    batch, head = toy_batch(), head_of(softcap, scale)
    hidden_KBTD = hidden_of(3, batch)
    part = part_of(hidden_KBTD, batch, head, "tokens")
    (found,) = torch.autograd.grad(part.share, hidden_KBTD)
    exact = hidden_KBTD.detach().double().requires_grad_()
    points_KNV = sqrt(V) * points_of(explicit(exact, head), batch, "tokens")
    sorted_KNP = (points_KNV @ directions_VP()).sort(dim=1).values
    pairs = [(sorted_KNP[i] - sorted_KNP[j]).square().mean() for i in range(3) for j in range(i)]
    distance = torch.stack(pairs).mean()
    assert part.swd is not None
    assert part.swd.item() == pytest.approx(distance.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(-3 * 0.7 * distance, exact)
    assert max_difference(found, expected) < 1e-5


def test_bf16_hidden_states_give_the_gradient_to_their_precision():
    batch, head = toy_batch(), head_of(dtype=torch.bfloat16)
    hidden_KBTD = hidden_of(3, batch, torch.bfloat16)
    exact, exact_head = hidden_KBTD.detach().float().requires_grad_(), head_of()
    exact_head.linear.load_state_dict(head.linear.state_dict())  # the same rounded weights
    found, expected = (
        torch.autograd.grad(part_of(own, batch, own_head, "tokens").share, own)[0]
        for own, own_head in ((hidden_KBTD, head), (exact, exact_head))
    )
    assert found.dtype == torch.bfloat16
    assert max_difference(found, expected) < 0.03


def test_the_directions_make_the_mean_squared_projection_the_squared_distance_whatever_the_vocabulary():
    """So lambda means the same for every base: distributions without a common token are at 2."""
    for width in (50, 5_000):
        pieces = Directions(4_000, 0, 1).pieces(width, torch.device("cpu"))
        slices_VP = torch.cat([slices for _, slices in pieces], 1)
        assert torch.allclose(slices_VP.norm(dim=0), torch.tensor(sqrt(width)))
        assert (slices_VP[3] - slices_VP[7]).square().mean().item() == pytest.approx(2, rel=0.1)


def test_directions_depend_on_seed_and_step_alone_and_differ_between_pieces(monkeypatch: pytest.MonkeyPatch):
    assert torch.equal(directions_VP(2), directions_VP(2))
    assert not torch.equal(directions_VP(2), directions_VP(3))
    assert not torch.equal(directions_VP(2), directions_VP(2, seed=1))
    monkeypatch.setattr(function_space, "CHUNK_ELEMENTS", 8 * V)
    assert len({tuple(direction.tolist()) for direction in directions_VP().T}) == P


def test_what_is_held_is_bounded_and_never_the_logits_of_all_points(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(function_space, "CHUNK_ELEMENTS", 4 * V)
    hidden_ND, head = torch.randn(50, D, requires_grad=True), head_of()
    weight, sizes = head.weight_VD.data_ptr(), list[int]()

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and V in made.shape and made.data_ptr() != weight:
                sizes.append(made.numel())
            return made

    with Watching():
        projected_probabilities(hidden_ND, head, Directions(3, 0, 0)).sum().backward()
    assert sizes
    assert max(sizes) <= 4 * V


def test_an_agent_that_is_not_finite_takes_its_pairs_away_and_leaves_the_others_theirs():
    batch, head = toy_batch(), head_of()
    hidden_KBTD = hidden_of(3, batch).detach()
    hidden_KBTD[1, 0, 4] = torch.nan
    hidden_KBTD.requires_grad_()
    nll_KBT = torch.zeros(hidden_KBTD.shape[:3])
    nll_KBT[1] = torch.nan
    more = {"num_targets": 20, "num_micro_batches": 1, "step": 2, "rows_per_process": 4, "head": head}
    swd = SwdSettings(P, "tokens", 0, "probabilities")
    three = objective(nll_KBT, hidden_KBTD, batch, lambda_sw=0.3, swd=swd, gather=lambda own: own, **more)
    (found,) = torch.autograd.grad(three.share, hidden_KBTD)
    sound = hidden_KBTD.detach()[::2].requires_grad_()
    two = objective(nll_KBT[::2], sound, batch, lambda_sw=0.15, swd=swd, gather=lambda own: own, **more)
    (expected,) = torch.autograd.grad(two.share, sound)
    assert max_difference(found[::2], expected) < 1e-5


def test_a_row_without_targets_has_no_point():
    batch = toy_batch(without_targets=2)
    for representation in ("tokens", "mean", "last"):
        swd = SwdSettings(P, representation, 0, "probabilities")
        _, valid_N = projections(hidden_of(2, batch), batch, swd, 0, 4, head_of())
        assert valid_N.view(4, -1).any(1).tolist() == [True, True, False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_value_and_gradient_are_those_of_float64_at_a_vocabulary_in_pieces(dtype: torch.dtype):
    """Also the memory: logits of all points would be 4 GB."""
    width, points, number = 64, 4_096, 300
    vocabulary = 256_000
    linear = nn.Linear(width, vocabulary, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    head, directions = Head(linear, 30.0), Directions(number, 0, 1)
    hidden_ND = torch.randn(points, width, device="cuda", dtype=dtype, requires_grad=True)
    upstream_NP = torch.randn(points, number, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    projected_NP = projected_probabilities(hidden_ND, head, directions)
    projected_NP.backward(upstream_NP)
    assert torch.cuda.max_memory_allocated() - before < 2**30
    slices_VP = torch.cat([own for _, own in directions.pieces(vocabulary, torch.device("cuda"))], 1)
    assert slices_VP.shape == (vocabulary, number)
    rows = slice(0, points, 512)
    exact = hidden_ND.detach()[rows].double().requires_grad_()
    logits_NV = 30 * torch.tanh(exact @ linear.weight.double().T / 30)
    expected_NP = logits_NV.softmax(-1) @ slices_VP.double()
    expected_NP.backward(upstream_NP[rows].double())
    tolerance = 1e-3 if dtype == torch.float32 else 0.03
    assert max_difference(projected_NP[rows], expected_NP) < tolerance
    assert hidden_ND.grad is not None
    assert exact.grad is not None
    assert max_difference(hidden_ND.grad[rows], exact.grad) < tolerance
