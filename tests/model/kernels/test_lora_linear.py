"""The linear layer with adapters, and several of one input, against float64 autograd on plain formulas."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from toy import max_difference

from chorus.model.kernels.lora_linear import ONE, SEVERAL, lora_linear

K, N, WIDTH_IN, R, SCALING = 3, 5, 8, 2, 1.7
WIDTHS_OUT = (6, 4, 4)
draw = partial(torch.randn, generator=torch.Generator())


@pytest.fixture(autouse=True)
def _every_test_draws_alike():
    draw.keywords["generator"].manual_seed(0)


def operands() -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """x_KNI, and of every layer weight_OI, A_KRI and B_KOR."""
    weights = [draw(width, WIDTH_IN) for width in WIDTHS_OUT]
    As = [draw(K, R, WIDTH_IN).requires_grad_() for _ in WIDTHS_OUT]
    Bs = [draw(K, width, R).requires_grad_() for width in WIDTHS_OUT]
    return draw(K, N, WIDTH_IN).requires_grad_(), weights, As, Bs


def assert_as_the_formula(function: Callable, tensors: Sequence[Tensor], formula: Callable) -> None:
    """Values of both, and gradients of those tensors that have one; one result or several."""
    due = [tensor for tensor in tensors if tensor.requires_grad]
    found, expected = function(*tensors), formula(*(tensor.double() for tensor in tensors))
    upstream = [draw(one.shape) for one in found]
    gradients = torch.autograd.grad(found, due, upstream)
    references = torch.autograd.grad(expected, due, [one.double() for one in upstream])
    for one, other in zip([*found, *gradients], [*expected, *references], strict=True):
        assert max_difference(one, other) < 1e-6


def formula(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    return x @ W.T + SCALING * (x @ A.mT) @ B.mT + (0 if bias is None else bias)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("first", [False, True], ids=["", "input-without-gradient"])
def test_values_and_gradients_are_those_of_the_formula_in_float64(bias: bool, first: bool):
    x_KNI, (weight_OI, *_), (A_KRI, *_), (B_KOR, *_) = operands()
    x_KNI.requires_grad_(not first)
    tensors = [x_KNI, weight_OI, A_KRI, B_KOR, *([draw(WIDTHS_OUT[0])] if bias else [])]
    assert_as_the_formula(
        lambda x, W, A, B, bias=None: [lora_linear(x, W, bias, A, B, SCALING)],
        tensors,
        lambda x, W, A, B, bias=None: [formula(x, W, bias, A, B)],
    )


@pytest.mark.parametrize("first", [False, True], ids=["", "input-without-gradient"])
def test_layers_of_one_input_give_what_each_gives_alone(first: bool):
    x_KNI, weights, As, Bs = operands()
    x_KNI.requires_grad_(not first)

    def split(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        return [tensors[kind::3] for kind in range(3)]

    layers = [tensor for layer in zip(weights, As, Bs, strict=True) for tensor in layer]
    assert_as_the_formula(
        lambda x, *layers: SEVERAL(x, *map(list, split(layers)), SCALING)[:-1],
        [x_KNI, *layers],
        lambda x, *layers: [formula(x, W, None, A, B) for W, A, B in zip(*split(layers), strict=True)],
    )


def test_the_operators_keep_what_they_promise_to_torch_compile():
    x_KNI, weights, As, Bs = operands()
    torch.library.opcheck(ONE, (x_KNI, weights[0], draw(WIDTHS_OUT[0]), As[0], Bs[0], SCALING))
    torch.library.opcheck(SEVERAL, (x_KNI, weights, As, Bs, SCALING))
    dys, low_KNR = [draw(K, N, width) for width in WIDTHS_OUT], draw(K, N, R * len(WIDTHS_OUT))
    (x_KNI,), As, Bs = ([tensor.detach() for tensor in tensors] for tensors in ([x_KNI], As, Bs))
    for need_dx in (True, False):
        of_one = (dys[0], x_KNI, draw(K, N, R), weights[0], As[0], Bs[0], SCALING, need_dx)
        torch.library.opcheck(torch.ops.chorus.lora_linear_backward.default, of_one)
        of_all = (dys, x_KNI, low_KNR, weights, As, Bs, SCALING, need_dx)
        torch.library.opcheck(torch.ops.chorus.lora_linears_backward.default, of_all)
