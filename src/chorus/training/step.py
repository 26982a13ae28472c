"""The result of an optimiser step, and the interface of the hooks that run after it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chorus.config.per_agent import NumberOrList
from chorus.data.batches import StepBatch


class StepResult:
    """The result of `Engine.step`. Creating one waits for nothing; reading its numbers may wait for the
    device.

    Attributes:
        lr: the learning rate of this step: of all agents, or of each.
        grad_norm: scalar: the gradient norm before clipping, over the agents that were stepped. Reading it
            waits for all work that is queued on the device.
        loss_scale: reads fp16's loss scale as it is now; 1 in other precisions.
    """

    def __init__(self, lr: NumberOrList, norm_K: Tensor, grad_norm: Tensor, loss_scale: Callable[[], float]):
        self.lr, self.grad_norm, self.loss_scale = lr, grad_norm, loss_scale
        self._norm_K = norm_K.to("cpu", non_blocking=True)
        self._has_come = None
        if norm_K.is_cuda:
            self._has_come = torch.cuda.Event()
            self._has_come.record()

    def agent_norms(self) -> list[float]:
        """Each agent's gradient norm. Not finite: the agent's
        update was skipped. Waits for this step alone."""
        if self._has_come is not None:
            self._has_come.synchronize()
        return self._norm_K.tolist()


class MicroBatchLosses(NamedTuple):
    """The contribution of one micro-batch of this process to the reported losses.

    Attributes:
        nll_K: summed NLL of each agent over this process's target tokens, weighted, nats.
        swd: R_SW over all processes; None when lambda is 0.
        shared_nll: the loss under responsibilities, which replaces the mean over all agents of `nll_K`; None
            without them.
    """

    nll_K: Tensor
    swd: Tensor | None
    shared_nll: Tensor | None = None


@dataclass
class StepDone:
    """A finished optimiser step, passed to hooks. A hook may request a checkpoint, or the end of training.

    Attributes:
        number: optimiser steps done, this one included.
        num_steps: those of the whole run.
        batch: this process's micro-batches.
        losses: one entry for each micro-batch, on the device.
        must_save: save a checkpoint of this step, whatever `save_steps` says.
        ends_training: end training after the hooks of this step.
        error: the error that ends training; None: a normal end.
    """

    number: int
    num_steps: int
    batch: StepBatch
    losses: list[MicroBatchLosses]
    result: StepResult
    must_save: bool = False
    ends_training: bool = False
    error: Exception | None = None

    def is_due(self, every: int) -> bool:
        """Whether an action every N steps, and after the last, is due. 0: only after the last."""
        return self.number == self.num_steps or (every > 0 and self.number % every == 0)

    def end(self, error: Exception | None = None) -> None:
        """Request a checkpoint of this step and the end of training. All processes must call it."""
        self.must_save = self.ends_training = True
        self.error = self.error or error


# Called after every optimiser step, on every process and in the same order, so that collective calls meet.
AfterStep = Callable[[StepDone], None]
