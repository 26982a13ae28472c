"""Token NLL against transformers' logits and float64 autograd."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from toy import max_difference, tiny_gemma, toy_batch

from chorus.model import token_nll as token_nll_module
from chorus.model.base import Head, head_of, trunk_of
from chorus.model.token_nll import SMALL_CAP, token_nll


def head(softcap: float | None, bias: bool = False, width: int = 16, vocabulary: int = 61) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Head(nn.Linear(width, vocabulary, bias=bias).requires_grad_(False), softcap)


def reference(hidden_BTD, batch, head: Head):
    """Plain autograd in float64, all logits at once."""
    x = nn.functional.linear(
        hidden_BTD.double(), head.weight_VD.double(), None if head.bias_V is None else head.bias_V.double()
    )
    x = x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
    return cross_entropy(x.transpose(1, 2), batch.target_BT, reduction="none") * batch.mask_BT


@pytest.mark.parametrize("softcap", [None, 0.5, 100.0])  # the last: with a maximum taken off
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_values_and_gradients_are_those_of_float64_autograd_at_any_chunk_size(
    monkeypatch, softcap, bias, chunk_rows
):
    monkeypatch.setattr(token_nll_module, "CHUNK_ELEMENTS", chunk_rows * 61)
    torch.manual_seed(0)  # not the state that earlier tests have left
    batch, hidden_BTD = toy_batch(), (3 * torch.randn(4, 10, 16)).requires_grad_()
    weight_BT = torch.randn(4, 10)  # each token's loss is weighted differently by what comes after
    nll_BT = token_nll(hidden_BTD, batch.target_BT, batch.target_rows_N, head(softcap, bias))
    expected_BT = reference(hidden_BTD, batch, head(softcap, bias))
    (gradient,) = torch.autograd.grad((nll_BT * weight_BT).sum(), hidden_BTD)
    (expected_gradient,) = torch.autograd.grad((expected_BT * weight_BT).sum(), hidden_BTD)
    assert max_difference(nll_BT, expected_BT) < (2e-6 if softcap == 100.0 else 1e-6)
    assert max_difference(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("softcap", [30.0, SMALL_CAP, 100.0])
@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_logits_at_their_cap_overflow_nothing(softcap: float, direction: float):
    own, batch = head(softcap), toy_batch()
    with torch.no_grad():
        own.weight_VD.abs_()
    hidden_BTD = torch.full((4, 10, 16), 1e6 * direction)
    nll_BT = token_nll(hidden_BTD, batch.target_BT, batch.target_rows_N, own)
    assert max_difference(nll_BT, reference(hidden_BTD, batch, own)) < 1e-5


def test_it_is_the_loss_of_the_models_own_logits():
    model, batch = tiny_gemma(), toy_batch()
    nll_BT = token_nll(
        trunk_of(model)(input_ids=batch.input_BT).last_hidden_state,
        batch.target_BT,
        batch.target_rows_N,
        head_of(model),
    )
    expected_BT = cross_entropy(
        model(input_ids=batch.input_BT).logits.transpose(1, 2), batch.target_BT, reduction="none"
    )
    assert max_difference(nll_BT, expected_BT * batch.mask_BT) < 1e-5


def test_bf16_hidden_states_cost_two_digits_of_the_gradient_and_none_of_the_dtype():
    batch, hidden_BTD = toy_batch(), torch.randn(4, 10, 16).bfloat16().requires_grad_()
    own = head(0.5)
    own.linear.bfloat16()
    nll_BT = token_nll(hidden_BTD, batch.target_BT, batch.target_rows_N, own)
    (gradient,) = torch.autograd.grad(nll_BT.sum(), hidden_BTD)
    (expected,) = torch.autograd.grad(reference(hidden_BTD, batch, own).sum(), hidden_BTD)
    assert (nll_BT.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert max_difference(gradient, expected) < 2e-2


def test_only_target_rows_pass_through_the_head(monkeypatch):
    """The logits of a whole batch never exist at once, nor those of a prompt."""
    seen = []
    original = token_nll_module._nll_and_slope

    def counting(hidden_CD, *rest):
        seen.append(len(hidden_CD))
        return original(hidden_CD, *rest)

    monkeypatch.setattr(token_nll_module, "_nll_and_slope", counting)
    monkeypatch.setattr(token_nll_module, "CHUNK_ELEMENTS", 5 * 61)
    batch = toy_batch()
    token_nll(torch.randn(4, 10, 16), batch.target_BT, batch.target_rows_N, head(None))
    assert max(seen) == 5
    assert sum(seen) == len(batch.target_rows_N) < batch.input_BT.numel()


def test_a_batch_without_targets_has_zero_loss_and_a_zero_gradient():
    hidden_BTD = torch.randn(1, 3, 16, requires_grad=True)
    nll_BT = token_nll(
        hidden_BTD, torch.zeros(1, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long), head(0.5)
    )
    nll_BT.sum().backward()
    assert bool((nll_BT == 0).all())
    assert hidden_BTD.grad is not None
    assert bool((hidden_BTD.grad == 0).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_compiled_loss_is_that_of_float64_autograd_on_the_gpu(monkeypatch, softcap):
    batch, hidden_BTD = toy_batch().to("cuda"), (3 * torch.randn(4, 10, 16)).cuda().requires_grad_()
    own = head(softcap, vocabulary=5000)
    own.linear.cuda()
    expected_BT = reference(hidden_BTD, batch, own)
    (expected,) = torch.autograd.grad(expected_BT.sum(), hidden_BTD)
    nll_BT = token_nll(hidden_BTD, batch.target_BT, batch.target_rows_N, own)
    (gradient,) = torch.autograd.grad(nll_BT.sum(), hidden_BTD)
    assert max_difference(nll_BT, expected_BT) < 1e-5
    assert max_difference(gradient, expected) < 1e-4
