"""The fused linear layer against float64 autograd on plain formulas."""

import pytest
import torch
from torch import Tensor
from toy import max_difference

from chorus.lora_linear import _backward, _forward, lora_linear

K, N, WIDTH_IN, WIDTH_OUT, R = 3, 5, 8, 6, 2


def operands(bias: bool, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(K, N, WIDTH_IN), (WIDTH_OUT, WIDTH_IN), (WIDTH_OUT,), (K, R, WIDTH_IN), (K, WIDTH_OUT, R)]
    x_KNI, weight_OI, bias_O, A_KRI, B_KOR = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [x_KNI, weight_OI, bias_O if bias else None, A_KRI, B_KOR]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("first", [False, True], ids=["", "input-without-gradient"])
def test_values_and_gradients_are_those_of_the_formula_in_float64(bias: bool, first: bool):
    x_KNI, weight_OI, bias_O, A_KRI, B_KOR = operands(bias)
    assert x_KNI is not None
    assert weight_OI is not None
    assert A_KRI is not None
    assert B_KOR is not None
    due = [tensor.requires_grad_() for tensor in ([] if first else [x_KNI]) + [A_KRI, B_KOR]]
    y_KNO = lora_linear(x_KNI, weight_OI, bias_O, A_KRI, B_KOR, 1.7)
    x, W, A, B = (tensor.double() for tensor in (x_KNI, weight_OI, A_KRI, B_KOR))
    expected_KNO = x @ W.T + 1.7 * (x @ A.mT) @ B.mT + (0 if bias_O is None else bias_O.double())
    upstream_KNO = torch.randn(y_KNO.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(y_KNO, due, upstream_KNO)
    expected = torch.autograd.grad(expected_KNO, due, upstream_KNO.double())
    assert max_difference(y_KNO, expected_KNO) < 1e-6
    for one, other in zip(gradients, expected, strict=True):
        assert max_difference(one, other) < 1e-6


def test_the_operators_keep_what_they_promise_to_torch_compile():
    x_KNI, weight_OI, bias_O, A_KRI, B_KOR = operands(bias=True)
    due = [tensor.requires_grad_() for tensor in (x_KNI, A_KRI, B_KOR) if tensor is not None]
    assert len(due) == 3
    torch.library.opcheck(_forward, (x_KNI, weight_OI, bias_O, A_KRI, B_KOR, 1.7))
    saved = (x_KNI, torch.randn(K, N, R), weight_OI, A_KRI, B_KOR)
    for need_dx in (True, False):
        detached = [tensor.detach() for tensor in saved if tensor is not None]
        torch.library.opcheck(_backward, (torch.randn(K, N, WIDTH_OUT), *detached, 1.7, need_dx))
