# pyright: reportIndexIssue=false
"""The Triton kernels behind `mixture_kernel.mixture_statistics`: two passes over the logits, each with a
small second kernel that reduces the partial results of a row. A row is split over several programs, so that
few rows can fill a GPU.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  (comes with torch for CUDA alone)
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 2048  # of the vocabulary, in registers at a time
PROGRAMS = 1024  # to fill a GPU of 132 multiprocessors
LOWEST = tl.constexpr(-1e30)  # below every logit, and finite: the difference of two is not NaN

TINY = tl.constexpr(1e-37)  # a normal fp32 number


@triton.jit
def _capped(output, scale, softcap, HAS_CAP: tl.constexpr):
    x = output.to(tl.float32) * scale
    if HAS_CAP:
        # softcap * tanh(x / softcap) by one exponential
        x = softcap * (2 * tl.sigmoid(x * (2 / softcap)) - 1)
    return x


@triton.jit
def _norms_of_parts(
    logits, part_max, part_sum, part_dot, stride_k, stride_n, N, V, per_part, scale, softcap,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one part of one row: the maximum m, sum exp(x - m) and sum exp(x - m) x."""
    row, part = tl.program_id(0), tl.program_id(1)
    start = logits + (row // N).to(tl.int64) * stride_k + (row % N).to(tl.int64) * stride_n
    highest, total, dot = LOWEST, 0.0, 0.0
    for first in range(part * per_part, (part + 1) * per_part, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < V
        x = _capped(tl.load(start + column, inside, other=0.0), scale, softcap, HAS_CAP)
        x = tl.where(inside, tl.maximum(x, LOWEST), LOWEST)
        before = highest
        highest = tl.maximum(highest, tl.max(x))
        shrink = tl.exp(before - highest)
        e = tl.where(inside, tl.exp(x - highest), 0.0)
        total = total * shrink + tl.sum(e)
        dot = dot * shrink + tl.sum(e * x)
    place = row * tl.num_programs(1) + part
    tl.store(part_max + place, highest)
    tl.store(part_sum + place, total)
    tl.store(part_dot + place, dot)


@triton.jit
def _join_norms(part_max, part_sum, part_dot, log_norm, entropy, parts, PARTS: tl.constexpr):
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    place, inside = row * parts + part, part < parts
    own = tl.load(part_max + place, inside, other=LOWEST)
    highest = tl.max(own)
    shrink = tl.where(inside, tl.exp(own - highest), 0.0)
    total = tl.sum(shrink * tl.load(part_sum + place, inside, other=0.0))
    dot = tl.sum(shrink * tl.load(part_dot + place, inside, other=0.0))
    norm = highest + tl.log(total)
    tl.store(log_norm + row, norm)
    tl.store(entropy + row, norm - dot / total)


@triton.jit
def _pool_parts(
    logits, log_norm, weight, part_best, part_token, part_plain, part_sum, part_dot, log_prob,
    stride_k, stride_n, K, N, V, per_part, scale, softcap, inverse_temperature,
    HAS_CAP: tl.constexpr, TEMPERED: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one part of one distribution: its best token, sum p
    log p, and with q = p^(1/T) sum q and sum q log p."""
    n, part = tl.program_id(0), tl.program_id(1)
    start = logits + n.to(tl.int64) * stride_n
    best, token, plain, total, dot = -1.0, 0, 0.0, 0.0, 0.0
    for first in range(part * per_part, (part + 1) * per_part, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < V
        p = tl.zeros([BLOCK], tl.float32)
        row = start
        for k in range(K):
            x = tl.load(row + column, inside, other=0.0)
            p += tl.load(weight + k) * tl.exp(
                _capped(x, scale, softcap, HAS_CAP) - tl.load(log_norm + k * N + n)
            )
            row += stride_k
        p = tl.where(inside, p, 0.0)
        log_p = tl.log(tl.maximum(p, TINY))
        plain += tl.sum(p * log_p)
        if TEMPERED:
            q = tl.where(p > 0, tl.exp(log_p * inverse_temperature), 0.0)
            total += tl.sum(q)
            dot += tl.sum(q * log_p)
        if WRITES:
            tl.store(log_prob + n.to(tl.int64) * V + column, tl.where(p > 0, log_p, float("-inf")), inside)
        highest = tl.max(tl.where(inside, p, -1.0))
        if highest > best:
            best = highest
            token = first + tl.argmax(tl.where(inside, p, -1.0), 0)
    place = n * tl.num_programs(1) + part
    tl.store(part_best + place, best)
    tl.store(part_token + place, token)
    tl.store(part_plain + place, plain)
    tl.store(part_sum + place, total)
    tl.store(part_dot + place, dot)


@triton.jit
def _join_pool(
    logits, log_norm, member_entropy, weight, part_best, part_token, part_plain, part_sum, part_dot,
    token_out, log_prob_out, entropy_out, mutual_out, log_partition_out, member_out,
    stride_k, stride_n, K, N, parts, scale, softcap, inverse_temperature,
    HAS_CAP: tl.constexpr, TEMPERED: tl.constexpr, PARTS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    n, part = tl.program_id(0), tl.arange(0, PARTS)
    place, inside = n * parts + part, part < parts
    best = tl.load(part_best + place, inside, other=-1.0)
    token = tl.load(part_token + place, inside, other=0)
    chosen = tl.sum(tl.where(part == tl.argmax(best, 0), token, 0))
    plain = -tl.sum(tl.load(part_plain + place, inside, other=0.0))
    entropy, log_partition = plain, 0.0
    if TEMPERED:
        total = tl.sum(tl.load(part_sum + place, inside, other=0.0))
        dot = tl.sum(tl.load(part_dot + place, inside, other=0.0))
        log_partition = tl.log(total)
        entropy = log_partition - dot / total * inverse_temperature
    k = tl.arange(0, MEMBERS)
    is_member = k < K
    w = tl.load(weight + k, is_member, other=0.0)
    own = tl.load(member_entropy + k * N + n, is_member, other=0.0)
    x = tl.load(logits + k.to(tl.int64) * stride_k + n.to(tl.int64) * stride_n + chosen, is_member, other=0.0)
    member = _capped(x, scale, softcap, HAS_CAP) - tl.load(log_norm + k * N + n, is_member, other=0.0)
    weighed = tl.where(is_member & (w > 0), member + tl.log(tl.maximum(w, TINY)), LOWEST)
    highest = tl.max(weighed)
    pooled = highest + tl.log(tl.sum(tl.exp(weighed - highest)))
    tl.store(token_out + n, chosen.to(tl.int64))
    tl.store(log_prob_out + n, pooled * inverse_temperature - log_partition)
    tl.store(entropy_out + n, entropy)
    tl.store(mutual_out + n, tl.maximum(plain - tl.sum(w * own), 0.0))
    tl.store(log_partition_out + n, log_partition)
    tl.store(member_out + k * N + n, member, is_member)


def triton_statistics(
    logits_KNV: Tensor,
    weight_K: Tensor,
    *,
    temperature: float,
    softcap: float | None,
    scale: float,
    want_log_prob: bool,
) -> tuple[Any, ...]:
    """The fields of `MixtureStatistics`, in order. The last dimension of the logits must be contiguous."""
    K, N, V = logits_KNV.shape
    strides, cap, has_cap = logits_KNV.stride()[:2], softcap or 1.0, softcap is not None

    def number(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=logits_KNV.device, dtype=dtype)

    parts, per_part = _parts(K * N, V)
    found = [number(K * N, parts) for _ in range(3)]
    log_norm_KN, member_entropy_KN = number(K, N), number(K, N)
    _norms_of_parts[K * N, parts](
        logits_KNV, *found, *strides, N, V, per_part, scale, cap, has_cap, BLOCK, num_warps=8
    )
    _join_norms[(K * N,)](
        *found, log_norm_KN, member_entropy_KN, parts, triton.next_power_of_2(parts), num_warps=1
    )

    parts, per_part = _parts(N, V)
    found = [number(N, parts, dtype=torch.int32 if place == 1 else torch.float32) for place in range(5)]
    log_prob_NV = number(N, V) if want_log_prob else None
    tempered = temperature != 1
    _pool_parts[N, parts](
        logits_KNV, log_norm_KN, weight_K, *found, log_prob_NV,
        *strides, K, N, V, per_part, scale, cap, 1 / temperature,
        has_cap, tempered, want_log_prob, BLOCK, num_warps=8,
    )  # fmt: skip
    token_N, member_KN = number(N, dtype=torch.int64), number(K, N)
    chosen_N, entropy_N, mutual_N, log_partition_N = (number(N) for _ in range(4))
    _join_pool[(N,)](
        logits_KNV, log_norm_KN, member_entropy_KN, weight_K, *found,
        token_N, chosen_N, entropy_N, mutual_N, log_partition_N, member_KN,
        *strides, K, N, parts, scale, cap, 1 / temperature,
        has_cap, tempered, triton.next_power_of_2(parts), triton.next_power_of_2(K), num_warps=1,
    )  # fmt: skip
    if log_prob_NV is not None and tempered:
        log_prob_NV.div_(temperature).sub_(log_partition_N[:, None])
    return token_N, chosen_N, member_KN, entropy_N, mutual_N, log_norm_KN, log_partition_N, log_prob_NV


def _parts(rows: int, V: int) -> tuple[int, int]:
    """How many programs share a row, and how much of it each takes: whole blocks."""
    blocks = triton.cdiv(V, BLOCK)
    per_part = triton.cdiv(blocks, min(blocks, max(1, PROGRAMS // rows)))
    return triton.cdiv(blocks, per_part), per_part * BLOCK
