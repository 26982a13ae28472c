"""The rows of metrics.jsonl: means over the steps since the previous row."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from chorus.monitoring.memory import peak_bytes
from chorus.monitoring.run_log import RunLog
from chorus.training.engine import Engine
from chorus.training.nonfinite import SkippedUpdates
from chorus.training.step import StepDone


class Means(NamedTuple):
    """Means over some steps, all processes and all micro-batches.

    Attributes:
        task_losses: CE of each agent, nats a token, weighted as it is minimised; NaN where a loss was not
            finite.
        swd: R_SW; None when lambda is 0.
        objective: the minimised quantity divided by K: the mean of the task losses, or the loss under
            responsibilities, minus lambda times R_SW, with each step's lambda.
        agent_tokens_per_second: K x B x T over the time, padding included.
    """

    task_losses: list[float]
    swd: float | None
    objective: float
    agent_tokens_per_second: float


class Meter:
    """Sums of the losses of this process's agents, and of tokens, over steps. They stay on the device until
    `read`, so that no step waits for them.
    """

    def __init__(self, num_agents: int, device: torch.device):
        self.num_agents = num_agents
        self.device = device
        self._reset()

    def _reset(self) -> None:
        self.ce_K = torch.zeros(self.num_agents, dtype=torch.float64, device=self.device)
        self.swd, self.reward, self.shared = self.ce_K.new_zeros(3)
        self.has_swd = self.is_shared = False
        self.tokens = 0
        self.steps = 0
        self.began = time.perf_counter()

    def add(self, step: StepDone, lambda_sw: float) -> None:
        """Add the losses of this process. Tokens count as the
        device computes them: B x T, padding included."""
        self.steps += 1
        for batch, losses in zip(step.batch.micro_batches, step.losses, strict=True):
            self.ce_K += losses.nll_K.double() / step.batch.num_targets
            self.tokens += batch.input_BT.numel() // batch.num_sets
            if losses.swd is not None:
                self.has_swd = True
                swd = losses.swd.double() / len(step.losses)
                self.swd += swd
                self.reward += lambda_sw * swd
            if losses.shared_nll is not None:
                self.is_shared = True
                self.shared += losses.shared_nll.double() / step.batch.num_targets

    def read(self, engine: Engine) -> Means:
        """Means over the steps since the last call, which resets them. A collective call."""
        tokens = torch.tensor([self.tokens], dtype=torch.float64, device=self.device)
        own_K, tokens = engine.mesh.sum_rows(torch.cat([self.ce_K / self.steps, tokens])).tensor_split([-1])
        ce = engine.mesh.gather_agents(own_K).tolist()
        seconds = time.perf_counter() - self.began
        swd = float(self.swd) / self.steps if self.has_swd else None
        task = sum(ce) / len(ce)
        if self.is_shared:
            task = float(engine.mesh.sum_rows(self.shared)) / self.steps
        objective = task - float(self.reward) / self.steps
        self._reset()
        return Means(ce, swd, objective, len(ce) * float(tokens) / seconds)


class LoggedMetrics:
    """Writes a row of metrics every `logging_steps` steps, after the first step, and after the last one."""

    def __init__(
        self,
        run_log: RunLog,
        engine: Engine,
        skips: SkippedUpdates,
        *,
        logging_steps: int,
        lambda_at: Callable[[int], float],
        with_memory: bool = False,
    ):
        self.run_log, self.engine, self.skips = run_log, engine, skips
        self.logging_steps, self.lambda_at, self.with_memory = logging_steps, lambda_at, with_memory
        self.device = engine.accelerator.device
        self.meter = Meter(len(engine.agents.agents), self.device)

    def after_step(self, step: StepDone) -> None:
        """Count the step; write a row if it is due, which is a collective call."""
        self.meter.add(step, self.lambda_at(step.number - 1))
        row = None
        if step.number == 1 or step.is_due(self.logging_steps):
            self.skips.settle(step)
            row = self._row(step)
        self.run_log.advance(row)

    def _row(self, step: StepDone) -> dict[str, Any]:
        means = self.meter.read(self.engine)
        task_loss = sum(means.task_losses) / len(means.task_losses)
        row = {
            "step": step.number,
            "loss": means.objective,
            "task_loss": task_loss,
            "swd": means.swd,
            "lambda_sw": self.lambda_at(step.number - 1),
            "task_loss_per_agent": means.task_losses,
            "lr": step.result.lr,
            "grad_norm": float(step.result.grad_norm),
            "skipped": self.skips.take_count(),
            "agent_tokens_per_second": means.agent_tokens_per_second,
        }
        if self.with_memory:
            row["peak_memory_gib"] = peak_bytes(self.device) / 2**30
        return row
