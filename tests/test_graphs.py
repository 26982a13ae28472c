"""When a pass is recorded and when it is not; recorded passes are held to the promises in test_agents.py, on a GPU."""

import weakref
from typing import Any

import torch
from torch import Tensor

from chorus.graphs import MAX_RECORDINGS, RecordedPasses


def times_weights(ids_NT: Tensor, flat_KF: Tensor, masks: Any) -> Tensor:
    assert masks is None, "an unrecorded pass leaves the masks to the trunk"
    return ids_NT * flat_KF.sum()


def no_masks(ids_NT: Tensor) -> Any:
    raise AssertionError("a pass that is not recorded needs no masks made ready")


def test_a_shape_beyond_the_limit_runs_unrecorded_with_its_gradient():
    passes = RecordedPasses(no_masks, recordings=dict.fromkeys(range(MAX_RECORDINGS)))  # pyright: ignore
    ids_NT, flat_KF = torch.ones(2, 3), torch.ones(1, 4, requires_grad=True)
    passes("another shape", times_weights, ids_NT, flat_KF).sum().backward()
    assert flat_KF.grad is not None
    assert torch.equal(flat_KF.grad, torch.full((1, 4), 6.0))
    assert len(passes.recordings) == MAX_RECORDINGS


def test_a_pass_while_another_awaits_its_backward_runs_unrecorded():
    """They share memory: a second replay would overwrite what the first one's backward reads."""
    first_NTD = torch.zeros(1)
    passes = RecordedPasses(no_masks, recordings={"shape": None}, awaiting=weakref.ref(first_NTD))  # pyright: ignore
    output = passes("shape", times_weights, torch.ones(2, 3), torch.ones(1, 4))
    assert torch.equal(output, torch.full((2, 3), 4.0))
