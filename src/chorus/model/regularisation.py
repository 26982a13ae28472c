"""Dropout and DropConnect: random draws that are the same in every mode and on recomputation."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chorus.config.per_agent import NumberOrList, largest, of_agent
from chorus.seeding import derive_seed


@dataclass(frozen=True)
class Noise:
    """The random draws of one training pass, the same for its recomputation and in every mode.

    Attributes:
        seed: the run's seed.
        step: optimiser step. DropConnect masks are one draw a step: the same on every process and
        micro-batch.
        slot: which micro-batch of which process within the step; dropout on activations differs between
        slots.
        keep: DropConnect masks (bool, of a flat adapter: keep_F) of the agents for which it is on.
        dropconnect_p, dropout_p: probabilities of dropping, in [0, 1): of all agents, or of each.
    """

    seed: int
    step: int
    slot: int
    keep: Mapping[int, Tensor]
    dropconnect_p: NumberOrList
    dropout_p: NumberOrList

    @property
    def drops_inputs(self) -> bool:
        """Whether an agent has dropout on the inputs of its adapters."""
        return largest(self.dropout_p) > 0

    def drop(self, x_NI: Tensor, agent: int, path: str) -> Tensor:
        """Dropout on a LoRA's input from a generator of its own, which draws the same on recomputation."""
        p = of_agent(self.dropout_p, agent)
        if p == 0:
            return x_NI
        generator = torch.Generator(x_NI.device)
        generator.manual_seed(derive_seed(self.seed, "lora_dropout", self.step, self.slot, agent, path))
        keep_NI = torch.empty_like(x_NI, dtype=torch.bool).bernoulli_(1 - p, generator=generator)
        return x_NI * keep_NI / (1 - p)


def draw_keep_masks(
    adapters: Mapping[int, Tensor], dropconnect_p: NumberOrList, seed: int, step: int
) -> dict[int, Tensor]:
    """DropConnect masks of one optimiser step: True with probability 1 - p, an independent draw for each
    agent; none for an agent whose p is 0."""
    keep: dict[int, Tensor] = {}
    for agent, adapter_F in adapters.items():
        p = of_agent(dropconnect_p, agent)
        if p == 0:
            continue
        generator = torch.Generator(adapter_F.device).manual_seed(
            derive_seed(seed, "dropconnect", step, agent)
        )
        keep_F = torch.empty_like(adapter_F, dtype=torch.bool)
        keep[agent] = keep_F.bernoulli_(1 - p, generator=generator)
    return keep


@dataclass(frozen=True)
class Regularisation:
    """How much randomness a training pass carries: probabilities of all agents, or one for each agent."""

    dropconnect_p: NumberOrList
    dropout_p: NumberOrList
    seed: int

    @property
    def is_off(self) -> bool:
        """Whether a training pass has no randomness."""
        return largest(self.dropconnect_p) == 0 and largest(self.dropout_p) == 0


def draw_noise(adapters: Mapping[int, Tensor], rates: Regularisation, step: int) -> Noise:
    """The random draws of an optimiser step, for its first micro-batch, DropConnect masks included."""
    keep = draw_keep_masks(adapters, rates.dropconnect_p, rates.seed, step)
    return Noise(rates.seed, step, 0, keep, rates.dropconnect_p, rates.dropout_p)
