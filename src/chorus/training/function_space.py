"""Projections of predicted next-token distributions onto random directions: points of function space.

A point has V numbers, 256,000 for Gemma, and only its P projections leave this module. Logits and directions
are computed a piece at a time. Backward recomputes each piece of logits: those of all points would take
gigabytes.
"""

from collections.abc import Iterator
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chorus.model.base import Head
from chorus.seeding import derive_seed

# Logits, or numbers of directions, held at once: 128 rows of 256,000. Forward and backward of a piece hold
# about five such tensors in fp32, 0.7 GB.
CHUNK_ELEMENTS = 2**25


class Directions(NamedTuple):
    """Random directions in the space of V-dimensional distributions, by the seed of the run and the step."""

    number: int
    seed: int
    step: int

    def pieces(self, width: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Some columns, and their slices_VP in fp32: directions uniform on the sphere, of norm sqrt(V).

        So the mean over directions of (projection of p - projection of q)^2 is |p - q|^2, at most 2 for any
        vocabulary. They are drawn on the device, the same on every process: on the host, millions of normal
        draws would take longer than the step.
        """
        at_once = max(1, CHUNK_ELEMENTS // width)
        for first in range(0, self.number, at_once):
            columns = slice(first, min(first + at_once, self.number))
            normal_VP = torch.empty(width, columns.stop - first, device=device)
            if not normal_VP.is_meta:  # the memory forecast: meta tensors have no values and no generator
                seed = derive_seed(self.seed, "directions", self.step, first)
                normal_VP.normal_(generator=torch.Generator(device).manual_seed(seed))
            yield columns, normal_VP.mul_(sqrt(width) / normal_VP.norm(dim=0))


def projected_probabilities(hidden_ND: Tensor, head: Head, directions: Directions) -> Tensor:
    """Each row's softmax over the vocabulary, projected: projected_NP, fp32.

    Its gradient reaches `hidden_ND` alone: the head is frozen.
    """
    return _Projected.apply(hidden_ND, head, directions)  # pyright: ignore[reportReturnType]


def _project(hidden_CD: Tensor, head: Head, slices_VP: Tensor) -> Tensor:
    return head.logits(hidden_CD).softmax(-1) @ slices_VP


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head: Head, directions: Directions) -> Tensor:
        ctx.save_for_backward(hidden_ND)
        ctx.head, ctx.directions = head, directions
        projected_NP = hidden_ND.new_empty(len(hidden_ND), directions.number, dtype=torch.float32)
        for rows, columns, slices_VP in _pieces(hidden_ND, head, directions):
            projected_NP[rows, columns] = _project(hidden_ND[rows], head, slices_VP)
        return projected_NP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (hidden_ND,), (upstream_NP,) = ctx.saved_tensors, gradients
        gradient_ND = torch.zeros_like(hidden_ND, dtype=torch.float32)
        for rows, columns, slices_VP in _pieces(hidden_ND, ctx.head, ctx.directions):
            with torch.enable_grad():
                own_CD = hidden_ND[rows].detach().requires_grad_()
                projected_CP = _project(own_CD, ctx.head, slices_VP)
            gradient_ND[rows] += torch.autograd.grad(projected_CP, own_CD, upstream_NP[rows, columns])[0]
        return gradient_ND.to(hidden_ND.dtype), None, None


def _pieces(hidden_ND: Tensor, head: Head, directions: Directions) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns of the result, and the directions of these columns."""
    V = len(head.weight_VD)
    at_once = max(1, CHUNK_ELEMENTS // V)
    for columns, slices_VP in directions.pieces(V, hidden_ND.device):
        for first in range(0, len(hidden_ND), at_once):
            yield slice(first, first + at_once), columns, slices_VP
