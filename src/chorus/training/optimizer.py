"""What is no number in one agent stays that agent's: its update is left out, the others' are what they would have been.

A loss that is NaN or infinite makes its agent's whole gradient NaN (`objective`), so the reduction of gradients tells
every process, and one norm for each agent tells all there is to know. Whether to step is decided where the gradients
are, and the host reads the norms a step later, so that nothing waits for them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class AgentwiseAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) over a parameter group for each agent, one that leaves a group as it was while
    the group's `skip` is 1.: weights, moments and step count.

    Fused AdamW knows such a flag, for loss scaling: one for all groups, on the device. Here every group has its own.
    DeepSpeed, too, steps group after group, so this holds in its partitions.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups, overflow = self.param_groups, getattr(self, "found_inf", None)  # a loss scaler's, for all groups
        try:
            for group in groups:
                self.param_groups = [group]
                self.found_inf = group["skip"] if overflow is None else torch.maximum(group["skip"], overflow)
                super().step()
        finally:
            self.param_groups, self.found_inf = groups, overflow


def adamw(adapters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> AgentwiseAdamW:
    """AdamW with torch's defaults besides, each agent's adapter a group."""
    groups = [{"params": [adapter_F], "skip": torch.zeros((), device=adapter_F.device)} for adapter_F in adapters]
    return AgentwiseAdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def skip_non_finite(groups: Sequence[dict[str, Any]], norm_K: Tensor) -> Tensor:
    """Have AdamW skip the agents whose gradient norm is no finite number; the norm over the others, a scalar."""
    is_bad_K = ~norm_K.isfinite()
    for group, skip in zip(groups, is_bad_K.float(), strict=True):
        group["skip"] = skip
    return torch.linalg.vector_norm(norm_K.masked_fill(is_bad_K, 0.0))


class StepNorms:
    """Each agent's gradient norm in one optimiser step, on its way to the host."""

    def __init__(self, norm_K: Tensor):
        self._norm_K = norm_K.to("cpu", non_blocking=True)
        self._has_come = None
        if norm_K.is_cuda:
            self._has_come = torch.cuda.Event()
            self._has_come.record()

    def read(self) -> list[float]:
        if self._has_come is not None:
            self._has_come.synchronize()
        return self._norm_K.tolist()
