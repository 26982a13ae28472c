"""Sums over micro-batches that become a row of metrics.jsonl."""

import time
from typing import Any

import torch

from chorus.monitoring.memory import peak_bytes
from chorus.training.engine import Engine
from chorus.training.objective import Objective


class Meter:
    """Sums of what every micro-batch reports, kept on the device: reading them is the only synchronisation."""

    def __init__(self, num_agents: int, device: torch.device, with_memory: bool = False):
        self.num_agents = num_agents
        self.device = device
        self.with_memory = with_memory
        self._reset()

    def _reset(self) -> None:
        self.ce_K = torch.zeros(self.num_agents, dtype=torch.float64, device=self.device)
        self.swd = torch.zeros((), dtype=torch.float64, device=self.device)
        self.has_swd = False
        self.tokens = 0
        self.steps = 0
        self.began = time.perf_counter()

    def add(self, part: Objective, num_targets: int, num_micro_batches: int, tokens: int) -> None:
        """One micro-batch of this process. `tokens` counts B x T, padding included, as the device computes it."""
        self.ce_K += part.nll_K.double() / num_targets
        self.tokens += tokens
        if part.swd is not None:
            self.has_swd = True
            self.swd += part.swd.double() / num_micro_batches

    def end_step(self) -> None:
        self.steps += 1

    def read(self, engine: Engine, lambda_sw: float, step: int, lr: float, skipped: int) -> dict[str, Any]:
        """Means over the steps since the last reading, over all processes; a collective call. Starts anew.

        `skipped` counts the agents' updates that were skipped since then. A mean is NaN where a loss was no number.
        """
        tokens = torch.tensor([self.tokens], dtype=torch.float64, device=self.device)
        *ce, tokens = engine.sum(torch.cat([self.ce_K / self.steps, tokens])).tolist()
        seconds = time.perf_counter() - self.began
        swd = float(self.swd) / self.steps if self.has_swd else None
        task_loss = sum(ce) / len(ce)
        metrics = {
            "step": step,
            "loss": task_loss - lambda_sw * (swd or 0.0),
            "task_loss": task_loss,
            "swd": swd,
            "task_loss_per_agent": ce,
            "lr": lr,
            "grad_norm": float(engine.grad_norm),
            "skipped": skipped,
            "agent_tokens_per_second": self.num_agents * tokens / seconds,
        }
        if self.with_memory:
            metrics["peak_memory_gib"] = peak_bytes(self.device) / 2**30
        self._reset()
        return metrics
