"""When a pass is recorded and when it is not; recorded passes are
held to the promises in test_agents.py, on a GPU."""

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from toy import tiny_gemma

from chorus.data.batches import Sample, collate
from chorus.errors import RunError
from chorus.model.agents import masks_of
from chorus.model.kernels import cuda_graphs
from chorus.model.kernels.cuda_graphs import MAX_CAPTURES, CapturedPasses, Rows, fill

ROWS = Rows(torch.ones(2, 3), None, None)


def times_weights(rows: Rows, flat_KF: Tensor, masks: Any) -> Tensor:
    assert masks is None, "an unrecorded pass makes its own masks"
    return rows.ids_NT * flat_KF.sum()


def no_masks(rows: Rows) -> Any:
    raise AssertionError("a pass that is not recorded needs no masks made ready")


def test_a_shape_beyond_the_limit_runs_unrecorded_with_its_gradient():
    passes = CapturedPasses(no_masks, captures=dict.fromkeys(range(MAX_CAPTURES)))  # pyright: ignore
    flat_KF = torch.ones(1, 4, requires_grad=True)
    passes("another shape", times_weights, ROWS, flat_KF).sum().backward()
    assert flat_KF.grad is not None
    assert torch.equal(flat_KF.grad, torch.full((1, 4), 6.0))
    assert len(passes.captures) == MAX_CAPTURES


def test_a_pass_while_another_awaits_its_backward_runs_unrecorded():
    """They share memory: a second replay would overwrite what the first one's backward reads."""
    first_NTD = torch.zeros(1)
    passes = CapturedPasses(no_masks, captures={"shape": None}, awaiting=weakref.ref(first_NTD))  # pyright: ignore
    output = passes("shape", times_weights, ROWS, torch.ones(1, 4))
    assert torch.equal(output, torch.full((2, 3), 4.0))


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_packed_rows_bring_their_own_masks_into_a_recording(
    attention: str, monkeypatch: pytest.MonkeyPatch
):
    """What a recording reads are the tensors that it was made
    with; all that depends on the rows is written over."""
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    masks_for = partial(masks_of, tiny_gemma(attention=attention))
    first, second = (packed_row(lengths) for lengths in ([200, 50], [60, 150]))
    captured, expected = first.copied(), masks_for(second)
    masks = masks_for(captured)
    assert any(not torch.equal(dense(masks[kind]), dense(expected[kind])) for kind in expected)
    fill(captured, masks, second, masks_for)
    for kind, mask in expected.items():
        assert torch.equal(dense(masks[kind]), dense(mask))
    assert torch.equal(captured.ids_NT, second.ids_NT)


def packed_row(lengths: list[int]) -> Rows:
    samples = [
        Sample(torch.full((length,), length % 61), torch.ones(length, dtype=torch.bool)) for length in lengths
    ]
    batch = collate(samples, 0, packing=301)
    return Rows(batch.input_BT, batch.position_BT, batch.sample_BT)


def dense(mask: Any) -> Tensor:
    """A block mask as it is seen: its blocks, and within them the function, which reads the rows."""
    if isinstance(mask, Tensor):
        return mask
    B, _, T, _ = mask.shape
    inside = create_mask(mask.mask_mod, B, None, T, T, device="cpu")
    return torch.cat([inside.flatten(), mask.to_dense().flatten().bool()])


def cannot_be_captured(rows: Rows, flat_KF: Tensor, masks: Any) -> Tensor:
    scale = float(flat_KF.detach().sum())  # waits for the device, which a capture refuses
    return rows.ids_NT[..., None] * flat_KF.sum() * scale


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_pass_that_cannot_be_captured_is_one_line_or_runs_without_a_graph():
    rows = Rows(torch.ones(2, 3, device="cuda"), None, None)
    flat_KF = torch.ones(1, 4, device="cuda", requires_grad=True)
    with pytest.raises(RunError, match="key 'cuda_graphs': a pass cannot be captured: "):
        CapturedPasses(lambda rows: None)("key", cannot_be_captured, rows, flat_KF)
    stream, passes = torch.cuda.current_stream(), CapturedPasses(lambda rows: None, may_fall_back=True)
    for _ in range(2):
        flat_KF.grad = None
        passes("key", cannot_be_captured, rows, flat_KF).sum().backward()
        assert flat_KF.grad is not None
        assert torch.equal(flat_KF.grad, torch.full((1, 4), 24.0, device="cuda"))
    assert passes.has_failed
    assert torch.cuda.current_stream() == stream
    again = CapturedPasses(lambda rows: None)  # and what follows is captured as ever
    hidden_NTD = again(
        "key", lambda rows, flat_KF, masks: rows.ids_NT[..., None] * flat_KF.sum(), rows, flat_KF
    )
    assert torch.equal(hidden_NTD, torch.full((2, 3, 1), 4.0, device="cuda"))
    assert len(again.captures) == 1


def test_a_capture_that_ends_for_lack_of_memory_is_no_reason_to_run_without_graphs(
    monkeypatch: pytest.MonkeyPatch,
):
    """It ends with an error of its own, on top of the cause."""

    def capture(*_: Any) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        except torch.OutOfMemoryError:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904

    monkeypatch.setattr(cuda_graphs, "_capture", capture)
    passes = CapturedPasses(lambda rows: None, may_fall_back=True)
    with pytest.raises(RuntimeError, match="a previous error"):
        passes("key", times_weights, ROWS, torch.ones(1, 4))
    assert not passes.has_failed
