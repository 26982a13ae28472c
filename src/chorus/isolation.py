"""What is no number in one agent stays that agent's: its update is left out, the others' are what they would have been.

A loss that is NaN or infinite makes its agent's whole gradient NaN (`objective`), so the reduction of gradients tells
every process, and one norm for each agent tells all there is to know. Whether to step is decided where the gradients
are, and the host reads the norms a step later, so that nothing waits for them.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chorus.errors import RunError

if TYPE_CHECKING:
    from chorus.engine import Engine

logger = logging.getLogger(__name__)


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


def leave_out(groups: Sequence[dict[str, Any]], norm_K: Tensor) -> Tensor:
    """Have AdamW skip the agents whose gradient norm is no finite number; the norm over the others, a scalar."""
    is_bad_K = ~norm_K.isfinite()
    for group, skip in zip(groups, is_bad_K.float(), strict=True):
        group["skip"] = skip
    return torch.linalg.vector_norm(norm_K.masked_fill(is_bad_K, 0.0))


class NormsOfAStep:
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


class Skips:
    """Says whose update was skipped at which step, and when that has come about in too many steps in a row.

    How many, `skips_in_a_row`, is kept in `facts`, the entries of `state.json`: going on does not forgive.
    """

    def __init__(self, max_skipped_steps: int, facts: dict[str, Any]):
        self.max_skipped_steps, self._facts = max_skipped_steps, facts
        facts.setdefault("skips_in_a_row", 0)
        self._waiting: list[tuple[int, NormsOfAStep]] = []
        self._since_read = 0
        self._latest = ""

    def look(self, step: int, engine: "Engine", at_once: bool) -> bool:
        """Look at the step before, and `at_once` also at the one that is done; whether the run must end.

        The answer is the same on every process, as the norms are. Under fp16, while the loss scale is above 1, a
        gradient that is no number is how the scale finds its place: no agent is updated, and the step does not count.

        Args:
            step: optimiser steps that are done.
        """
        assert engine.norms is not None
        self._waiting.append((step, engine.norms))
        while len(self._waiting) > (0 if at_once else 1):
            step, norms = self._waiting.pop(0)
            bad = {agent: norm for agent, norm in enumerate(norms.read()) if not math.isfinite(norm)}
            if bad and engine.loss_scale() > 1:
                logger.info("step %d: the gradient overflowed under fp16's loss scale, which shrinks; no update", step)
                continue
            self._facts["skips_in_a_row"] = self._facts["skips_in_a_row"] + 1 if bad else 0
            self._since_read += len(bad)
            if bad:
                self._latest = (
                    f"agent{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}: loss or gradient is no number at step "
                    f"{step} (gradient norm {', '.join(map(str, bad.values()))})"
                )
                logger.warning(
                    "%s; the update was skipped, and no other agent's (%d such steps in a row, max_skipped_steps %d)",
                    *(self._latest, self._facts["skips_in_a_row"], self.max_skipped_steps),
                )
        return self._facts["skips_in_a_row"] > self.max_skipped_steps

    def read(self) -> int:
        """Agents' updates that were skipped since the last reading."""
        count, self._since_read = self._since_read, 0
        return count

    def error(self, step: int, output_dir: str) -> RunError:
        """Why the run ends after `step`, which is saved."""
        return RunError(
            f"{self._latest}; key 'max_skipped_steps' allows {self.max_skipped_steps} steps in a row with a skipped "
            f"update, and this was number {self._facts['skips_in_a_row']}; {output_dir}/checkpoints/step_{step:06d} "
            "holds every agent's last good state; lower lr, or look at the rows of that step"
        )
