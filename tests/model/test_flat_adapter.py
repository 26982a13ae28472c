"""Adapters in one piece: every matrix in its place, and the gradients of a pass in theirs."""

import pytest
import torch
from torch import Tensor, nn
from toy import max_difference

from chorus.model.flat_adapter import Factors, Layout, Matrix, stack

K, R, WIDTH_IN, WIDTH_OUT = 3, 2, 8, 6
SHAPES: dict[Matrix, torch.Size] = {
    ("x", "A"): torch.Size((R, WIDTH_IN)),
    ("x", "B"): torch.Size((WIDTH_OUT, R)),
    ("y", "A"): torch.Size((R, WIDTH_OUT)),
}
F = R * WIDTH_IN + WIDTH_OUT * R + R * WIDTH_OUT
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_views_write_through_and_join_is_their_counterpart():
    layout, flat_F = Layout(SHAPES), drawn(F)
    views = layout.views(flat_F)
    assert {key: view.shape for key, view in views.items()} == SHAPES
    assert torch.equal(torch.cat([view.flatten() for view in views.values()]), flat_F)
    views["x", "B"][1, 1] = 7.0
    assert float(flat_F[R * WIDTH_IN + R + 1]) == 7.0
    shuffled = {key: views[key].clone() for key in reversed(SHAPES)}
    assert torch.equal(layout.join(shuffled), flat_F)


@DTYPES
@pytest.mark.parametrize("is_masked", [False, True], ids=["", "dropconnect"])
@pytest.mark.parametrize("gains", [(1.0, 1.0, 1.0), (1.0, 4.0, 0.3)], ids=["", "gains"])
def test_a_pass_gets_every_agents_weights_and_they_get_its_gradients(
    gains: tuple[float, ...], is_masked: bool, dtype: torch.dtype
):
    """Closed form: a masked and rescaled copy, in which A enters squared and B linearly. With masks, agent 2
    has none."""
    layout, adapters = Layout(SHAPES), [nn.Parameter(drawn(F, seed=k)) for k in range(K)]
    before = [adapter_F.detach().clone() for adapter_F in adapters]
    keeps = [drawn(F, seed=k) < 0.3 if is_masked and k < 2 else None for k in range(K)]
    keep_ps = (0.6, 0.9, 1.0)
    factors = []
    for keep_F, keep_p, gain in zip(keeps, keep_ps, gains, strict=True):
        factor_F = torch.ones(F) if keep_F is None else keep_F / keep_p
        layout.views(factor_F)["x", "B"].mul_(gain)
        factors.append(factor_F)
    is_B_F = layout.is_B(torch.device("cpu"))
    of_agents = [Factors(*own, is_B_F) for own in zip(keeps, keep_ps, gains, strict=True)]
    matrices = layout.stacked(stack(adapters, dtype, of_agents))
    (matrices["x", "A"].float().square().sum() + 3 * matrices["x", "B"].float().sum()).backward()
    rounding = 1e-6 if dtype is torch.float32 else 0.01
    for k, (adapter_F, factor_F) in enumerate(zip(adapters, factors, strict=True)):
        weights, factor = layout.views(before[k]), layout.views(factor_F)
        for key, matrix_K in matrices.items():
            assert matrix_K.dtype is dtype
            assert max_difference(matrix_K[k], weights[key] * factor[key]) < rounding
        assert adapter_F.grad is not None
        assert adapter_F.grad.dtype is torch.float32
        gradient = layout.views(adapter_F.grad)
        assert (
            max_difference(gradient["x", "A"], 2 * weights["x", "A"] * factor["x", "A"] ** 2) < 2 * rounding
        )
        assert max_difference(gradient["x", "B"], 3 * factor["x", "B"]) < rounding
        assert not gradient["y", "A"].any()
        assert torch.equal(adapter_F, before[k]), "a pass wrote to the weights"


def test_a_gradient_that_a_parameter_keeps_is_its_own():
    """A recorded pass writes its gradients over at the next replay."""
    adapters = [nn.Parameter(drawn(F, seed=k)) for k in range(K)]
    of_the_pass_KF = drawn(K, F)
    kept_KF = of_the_pass_KF.clone()
    stack(adapters, torch.float32).backward(of_the_pass_KF)
    of_the_pass_KF.zero_()
    for adapter_F, kept_F in zip(adapters, kept_KF, strict=True):
        assert torch.equal(adapter_F.grad, kept_F)  # pyright: ignore[reportArgumentType]
