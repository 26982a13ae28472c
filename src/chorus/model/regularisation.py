"""Dropout and DropConnect: the random draws of a training pass, equal in every mode and on recomputation."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from chorus.seeding import derive_seed


@dataclass(frozen=True)
class Noise:
    """The random draws of one training pass. Equal for a pass and its recomputation, and in every mode.

    Attributes:
        seed: the run's seed.
        step: optimiser step. DropConnect masks are one draw a step: the same on every process and
        micro-batch.
        slot: which micro-batch of which process within the step; dropout on activations differs between
        slots.
        keep: each agent's DropConnect mask (bool, of its flat adapter: keep_F), empty when it is off.
        dropconnect_p, dropout_p: probabilities of dropping, in [0, 1).
    """

    seed: int
    step: int
    slot: int
    keep: Mapping[int, Tensor]
    dropconnect_p: float
    dropout_p: float

    def drop(self, x_NI: Tensor, agent: int, path: str) -> Tensor:
        """Dropout on a LoRA's input from a generator of its own:
        nothing global moves, a recomputation draws alike."""
        if self.dropout_p == 0:
            return x_NI
        generator = torch.Generator(x_NI.device)
        generator.manual_seed(derive_seed(self.seed, "lora_dropout", self.step, self.slot, agent, path))
        keep_NI = torch.empty_like(x_NI, dtype=torch.bool).bernoulli_(1 - self.dropout_p, generator=generator)
        return x_NI * keep_NI / (1 - self.dropout_p)


def draw_keep_masks(
    adapters: Mapping[int, Tensor], dropconnect_p: float, seed: int, step: int
) -> dict[int, Tensor]:
    """DropConnect masks of one optimiser step: True with
    probability 1 - p, an independent draw for each agent."""
    keep: dict[int, Tensor] = {}
    for agent, adapter_F in adapters.items():
        generator = torch.Generator(adapter_F.device).manual_seed(
            derive_seed(seed, "dropconnect", step, agent)
        )
        keep_F = torch.empty_like(adapter_F, dtype=torch.bool)
        keep[agent] = keep_F.bernoulli_(1 - dropconnect_p, generator=generator)
    return keep


@dataclass(frozen=True)
class Regularisation:
    """How much randomness a training pass carries."""

    dropconnect_p: float
    dropout_p: float
    seed: int


def draw_noise(adapters: Mapping[int, Tensor], rates: Regularisation, step: int) -> Noise:
    """The random draws of an optimiser step, for its first micro-batch, DropConnect masks included."""
    masked = adapters if rates.dropconnect_p > 0 else {}
    keep = draw_keep_masks(masked, rates.dropconnect_p, rates.seed, step)
    return Noise(rates.seed, step, 0, keep, rates.dropconnect_p, rates.dropout_p)
