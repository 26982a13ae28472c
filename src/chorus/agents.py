"""K agents over one frozen base, in one of three modes behind one interface.

sequential  one PeftModel with K adapters; an agent's activations are made again in backward, so that only one agent's
            are ever held: the least memory, one forward pass more.
parallel    K PeftModels whose frozen parameters and buffers are the same storage; all activations are held.

Every mode keeps five promises (tests/test_agents.py holds them):

1. the agents in order, the stated shapes and dtypes;
2. gradients reach the adapters of every agent and nothing else;
3. same weights, batch and step: the values and gradients of every other mode, and of K single-agent PEFT runs;
4. all of it under gradient checkpointing;
5. no trace left: no weight, flag or global random state changed by a forward.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from chorus.adapters import (
    LoraShape,
    Noise,
    Routing,
    TensorId,
    Turn,
    attach_agents,
    draw_keep_masks,
    enable_gradient_checkpointing,
    lora_layers,
)
from chorus.base import Head, base_tensors, head_of, trunk_of
from chorus.data import Batch
from chorus.token_nll import token_nll

Mode = Literal["sequential", "parallel"]


class AgentOutput(NamedTuple):
    """What every mode returns, the agents in order.

    Attributes:
        nll_KBT: fp32 token NLL, nats; 0 where no loss is due.
        hidden_KBTD: after the final norm, in the trunk's dtype.
    """

    nll_KBT: Tensor
    hidden_KBTD: Tensor


@dataclass(frozen=True)
class NoiseRates:
    """How much randomness a training pass carries."""

    dropconnect_p: float
    dropout_p: float
    seed: int


def held_agents(num_agents: int) -> tuple[int, ...]:
    """The agents that this process holds: all of them. The one place to change if they are ever spread over GPUs."""
    return tuple(range(num_agents))


def build_agents(
    mode: Mode,
    model: PreTrainedModel,
    num_agents: int,
    shape: LoraShape,
    rates: NoiseRates,
    gradient_checkpointing: bool = False,
) -> "Agents":
    """Put the agents this process holds on `model`, which must already lie on its device, frozen.

    Raises:
        InputError: target modules or gradient checkpointing that the model does not have.
    """
    agents = held_agents(num_agents)
    routing = Routing()
    match mode:
        case "sequential":
            peft_models = [attach_agents(model, agents, shape, routing)]
            kind = SequentialAgents
        case "parallel":
            copies = [model, *(copy_sharing_storage(model) for _ in agents[1:])]
            peft_models = [attach_agents(own, [k], shape, routing) for own, k in zip(copies, agents, strict=True)]
            kind = ParallelAgents
    if gradient_checkpointing:
        for peft_model in peft_models:
            enable_gradient_checkpointing(causal_lm(peft_model), routing)
    return kind(agents, peft_models, routing, rates)


def copy_sharing_storage(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same parameters and buffers: its own adapters, no memory for the base."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in tensors})


def causal_lm(peft_model: PeftModel) -> PreTrainedModel:
    """The transformers model inside, adapters included."""
    return peft_model.get_base_model()  # pyright: ignore[reportReturnType]


class Agents(nn.Module):
    """The interface of all modes. A mode says how one batch passes through its agents."""

    def __init__(self, agents: Sequence[int], peft_models: list[PeftModel], routing: Routing, rates: NoiseRates):
        super().__init__()
        self.agents = tuple(agents)
        self.peft_models = nn.ModuleList(peft_models)
        self.routing = routing
        self.rates = rates
        self.config = causal_lm(peft_models[0]).config
        self._noise: Noise | None = None
        self.train()

    def forward(self, batch: Batch, step: int | None = None, slot: int = 0) -> AgentOutput:
        """One pass of every agent over one batch.

        Args:
            batch: input_BT, target_BT and what is due of them.
            step: the optimiser step, which names this pass's random draws. None is evaluation: no DropConnect, no
                dropout.
            slot: which micro-batch of which process within the step.
        """
        raise NotImplementedError

    def peft_model(self, agent: int) -> PeftModel:
        """The PeftModel that holds this agent's adapter."""
        raise NotImplementedError

    @contextmanager
    def trunk(self, agent: int | None, noise: Noise | None = None) -> Iterator[nn.Module]:
        """The trunk with one agent's adapter in it, or the base alone (None)."""
        peft_model = self.peft_model(self.agents[0] if agent is None else agent)
        with self.routing.of(Turn(agent, noise)):
            yield trunk_of(causal_lm(peft_model))

    def head(self) -> Head:
        """The output layer, one for all agents."""
        return head_of(causal_lm(self.peft_model(self.agents[0])))

    def adapter_tensors(self) -> dict[TensorId, nn.Parameter]:
        """Every trainable tensor under its identity: agent by agent, in the model's order."""
        return {
            TensorId(agent, path, matrix): layer.adapter_weight(agent, matrix)
            for agent in self.agents
            for path, layer in lora_layers(self.peft_model(agent)).items()
            for matrix in ("A", "B")
        }

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the base, each once."""
        return dict(base_tensors(causal_lm(self.peft_model(self.agents[0]))))

    def agent_pass(self, agent: int | None, batch: Batch, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """nll_BT and hidden_BTD of one agent, or of the base (None).

        There is no attention mask: the padding is on the right, behind every target.
        """
        with self.trunk(agent, noise) as trunk:
            hidden_BTD = trunk(input_ids=batch.input_BT, use_cache=False).last_hidden_state
        return token_nll(hidden_BTD, batch.target_BT, batch.target_rows_N, self.head()), hidden_BTD

    def _noise_of(self, step: int | None, slot: int) -> Noise | None:
        """The draws of this pass. Masks are drawn once a step and kept for its other micro-batches."""
        rates = self.rates
        if step is None or (rates.dropconnect_p == 0 and rates.dropout_p == 0):
            return None
        if self._noise is None or self._noise.step != step:
            weights = self.adapter_tensors() if rates.dropconnect_p > 0 else {}
            keep = draw_keep_masks(weights, rates.dropconnect_p, rates.seed, step)
            self._noise = Noise(rates.seed, step, slot, keep, rates.dropconnect_p, rates.dropout_p)
        return replace(self._noise, slot=slot)


class SequentialAgents(Agents):
    """One agent after the other through one PeftModel; backward makes each agent's activations again."""

    def peft_model(self, agent: int) -> PeftModel:
        return self.peft_models[0]  # pyright: ignore[reportReturnType]

    def forward(self, batch: Batch, step: int | None = None, slot: int = 0) -> AgentOutput:
        noise = self._noise_of(step, slot)
        tensors = self.adapter_tensors()
        outputs = []
        for agent in self.agents:
            own = [tensor for identity, tensor in tensors.items() if identity.agent == agent]
            outputs.append(recomputed(lambda agent=agent: self.agent_pass(agent, batch, noise), own))
        nlls, hiddens = zip(*outputs, strict=True)
        return AgentOutput(torch.stack(nlls), torch.stack(hiddens))


class ParallelAgents(Agents):
    """K PeftModels over one storage: each agent has a module tree of its own, no adapter is ever switched."""

    def peft_model(self, agent: int) -> PeftModel:
        return self.peft_models[self.agents.index(agent)]  # pyright: ignore[reportReturnType]

    def forward(self, batch: Batch, step: int | None = None, slot: int = 0) -> AgentOutput:
        noise = self._noise_of(step, slot)
        nlls, hiddens = zip(*(self.agent_pass(agent, batch, noise) for agent in self.agents), strict=True)
        return AgentOutput(torch.stack(nlls), torch.stack(hiddens))


def recomputed(run: Callable[[], tuple[Tensor, ...]], parameters: Sequence[nn.Parameter]) -> tuple[Tensor, ...]:
    """`run()` without its activations: forward keeps the outputs alone, backward runs it again.

    The parameters are arguments of one autograd node, so their gradients leave it as ordinary outputs: a single
    backward serves all agents, and the hooks by which DDP and DeepSpeed reduce gradients see each of them once.
    """
    return _Recomputed.apply(run, *parameters)  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[], tuple[Tensor, ...]], *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)  # without the diversity term no gradient comes through the hidden states
        ctx.save_for_backward(*parameters)
        return run()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        with torch.enable_grad():
            outputs = ctx.run()
        due = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
        outputs, gradients = zip(*due, strict=True)
        return None, *torch.autograd.grad(outputs, ctx.saved_tensors, gradients)
