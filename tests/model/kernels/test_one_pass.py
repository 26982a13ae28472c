"""Reductions of a row that is read with something broadcast: how inductor is told to make them, and that it does."""

from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch._inductor.config
from sympy import Integer, symbols
from torch import Tensor
from torch._inductor.choices import InductorChoices
from torch._inductor.dependencies import MemoryDep
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V
from toy import tiny_gemma

from chorus.model.adapters import AdapterRouter
from chorus.model.kernels.decoder_layers import prepare_layers
from chorus.model.kernels.one_pass import LONGEST, OnePass


@pytest.fixture(autouse=True)
def _inductor_is_as_it_was():
    with torch._inductor.config.patch(inductor_choices_class=None):
        yield
    torch._dynamo.reset()


ROWS, COLUMNS = 512 * symbols("p0") + symbols("p1"), symbols("p0") + 65_536 * symbols("p1")


@pytest.mark.parametrize(
    ("hint", "length", "index", "is_ours"),
    [
        (ReductionHint.DEFAULT, Integer(512), ROWS, True),
        (ReductionHint.DEFAULT, Integer(LONGEST), ROWS, True),
        (ReductionHint.DEFAULT, Integer(LONGEST + 1), ROWS, False),
        (ReductionHint.DEFAULT, symbols("s0"), ROWS, False),
        (ReductionHint.DEFAULT, Integer(512), COLUMNS, False),
        (ReductionHint.INNER, Integer(512), ROWS, False),
        (ReductionHint.OUTER, Integer(512), COLUMNS, False),
    ],
    ids=str,
)
def test_only_short_rows_read_with_something_broadcast_are_decided_here(
    hint: ReductionHint, length: Any, index: Any, is_ours: bool, monkeypatch: pytest.MonkeyPatch
):
    inductors_own = object()
    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", staticmethod(lambda *_: inductors_own))
    read = MemoryDep("scores", index, symbols("p0 p1"), (Integer(65_536), Integer(512)))
    node = SimpleNamespace(read_writes=SimpleNamespace(reads=[read]))
    own = {"get_reduction_hint": lambda: hint, "reduction_nodes": lambda: [node]}
    features = cast(Any, SimpleNamespace(reduction_numel=length, **own))
    assert OnePass.should_use_persistent_reduction(features, False) is (True if is_ours else inductors_own)
    assert OnePass.should_use_persistent_reduction(features, True) is inductors_own


def test_inductor_takes_these_choices_once_layers_are_compiled():
    prepare_layers(tiny_gemma(), AdapterRouter(), recompute="none", compiled=True)
    with ThreadPoolExecutor(1) as thread:  # a thread asks once, and this one may have asked before
        assert isinstance(thread.submit(copy_context().run, lambda: V.choices).result(), OnePass)


def softmax(scores_NHTT: Tensor, mask_N1TT: Tensor) -> Tensor:
    return torch.softmax(50 * torch.tanh(scores_NHTT / 50) + mask_N1TT, dim=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_softmax_under_one_mask_for_all_heads_takes_one_pass():
    generator = torch.Generator("cuda").manual_seed(0)
    # With fewer rows than 64 for each of a GPU's multiprocessors, inductor makes one pass by itself.
    scores_NHTT = 30 * torch.randn(8, 8, 512, 512, generator=generator, device="cuda")
    mask_N1TT = torch.full((512, 512), -torch.inf, device="cuda").triu(1).expand(8, 1, 512, 512).contiguous()
    torch._dynamo.reset()
    with torch._inductor.config.patch(inductor_choices_class=OnePass), V.set_choices_handler(OnePass()):
        weights_NHTT, code = run_and_get_code(torch.compile(softmax), scores_NHTT, mask_N1TT)
    assert "triton_per_fused" in "".join(code)
    assert "triton_red_fused" not in "".join(code)
    expected_NHTT = softmax(scores_NHTT.double(), mask_N1TT.double())
    assert float((weights_NHTT - expected_NHTT).abs().max()) < 1e-4
