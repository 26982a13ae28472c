"""K agents over one frozen base, in one of three modes behind one interface.

fused       one PeftModel with K adapters; all agents in one pass over K x B rows: the fastest. In groups of
            `agents_per_pass`, backward recomputes a group's activations, so that only one group's are held at
            a time; not with recompute "full", which already holds those of one layer only.
sequential  groups of one: the least memory, one forward pass more.
parallel    K PeftModels whose frozen parameters and buffers are the same storage; all activations are held.

Every mode keeps five promises, tested in tests/model/test_agents.py:

1. the agents in order, the stated shapes and dtypes; 2. gradients reach the adapters of every agent and
nothing else; 3. same weights, batch and step: the values and gradients of every other mode, and of K
single-agent PEFT runs; 4. all of it under gradient checkpointing; 5. no trace left: no weight, flag or global
random state changed by a forward.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from chorus.config.execution import Mode
from chorus.data.batches import Batch
from chorus.mesh import ALONE, Mesh
from chorus.model.adapters import (
    BASE_ALONE,
    AdapterRouter,
    LoraShape,
    TensorId,
    adapter_context,
    adapter_name,
    attach_agents,
    factors_of,
    lora_layers,
    take_matrices,
)
from chorus.model.attention import attention_masks
from chorus.model.base import Head, base_tensors, copy_sharing_storage, head_of, trunk_of
from chorus.model.execution import PLAIN, Execution
from chorus.model.flat_adapter import Layout, stack
from chorus.model.kernels.cuda_graphs import CapturedPasses, Pass, Rows
from chorus.model.kernels.decoder_layers import prepare_layers, recomputed
from chorus.model.regularisation import Noise, Regularisation, draw_noise
from chorus.model.token_nll import token_nll
from chorus.spans import span

# Runs `pass(rows, flat_KF, masks)` for a key; passes of equal keys do the same. Implemented by
# `CapturedPasses`.
RunPass = Callable[[Hashable, Pass, Rows, Tensor], Tensor]


class AgentOutput(NamedTuple):
    """What every mode returns, the agents in order.

    Attributes:
        nll_KBT: fp32 token NLL, nats; 0 where no loss is due.
        hidden_KBTD: after the final norm, in the trunk's dtype.
    """

    nll_KBT: Tensor
    hidden_KBTD: Tensor


DrawNoise = Callable[[Mapping[int, Tensor], Regularisation, int], Noise]


def build_agents(
    mode: Mode,
    model: PreTrainedModel,
    num_agents: int,
    shape: LoraShape,
    rates: Regularisation,
    execution: Execution = PLAIN,
    run_pass: RunPass | None = None,
    draw: DrawNoise = draw_noise,
    mesh: Mesh = ALONE,
) -> "Agents":
    """Attach this process's agents to `model`, which must be frozen and on its device.

    Args:
        num_agents: of the run. `mesh` decides which of them this process holds.
        run_pass: runs training passes; None: with or without CUDA graphs, as `execution` says.
        draw: draws the noise of an optimiser step.

    Raises:
        InputError: target modules, gradient checkpointing or compilation that the model does not have.
    """
    agents = mesh.held_agents(num_agents)
    router = AdapterRouter()
    targets = shape.targets(model)
    targets.log()
    if run_pass is None and execution.captured:
        run_pass = CapturedPasses(partial(masks_of, model, explicit=True), execution.may_fall_back)
    match mode:
        case "fused" | "sequential":
            size = 1 if mode == "sequential" else execution.agents_per_pass or len(agents)
            groups = [agents[first : first + size] for first in range(0, len(agents), size)]
            is_recomputed = mode == "sequential" or execution.recompute != "full"
            peft_models = [attach_agents(model, agents, shape, router, targets.paths)]
            parts = (agents, peft_models, router, rates, shape, run_pass, draw)
            built = GroupedAgents(*parts, groups=groups, is_recomputed=is_recomputed)
        case "parallel":
            copies = [model, *(copy_sharing_storage(model) for _ in agents[1:])]
            own_agents = zip(copies, agents, strict=True)
            peft_models = [attach_agents(own, [k], shape, router, targets.paths) for own, k in own_agents]
            built = ParallelAgents(agents, peft_models, router, rates, shape, run_pass, draw)
    for peft_model in peft_models:
        prepare_layers(
            causal_lm(peft_model),
            router,
            recompute=execution.recompute,
            compiled=execution.compiled,
            may_fall_back=execution.may_fall_back,
        )
    return built


def masks_of(model: PreTrainedModel, rows: Rows, *, explicit: bool = False) -> Any:
    """The attention masks of a pass through `rows`, see `attention_masks`."""
    return attention_masks(model, rows.ids_NT, rows.sample_NT, explicit=explicit)


def causal_lm(peft_model: PeftModel) -> PreTrainedModel:
    """The transformers model inside, adapters included."""
    return peft_model.get_base_model()  # pyright: ignore[reportReturnType]


class Agents(nn.Module):
    """The interface of all modes. A mode says how one batch passes through its agents."""

    def __init__(
        self,
        agents: Sequence[int],
        peft_models: list[PeftModel],
        router: AdapterRouter,
        rates: Regularisation,
        shape: LoraShape,
        run_pass: RunPass | None,
        draw: DrawNoise,
    ):
        super().__init__()
        self.agents = tuple(agents)
        self.peft_models = nn.ModuleList(peft_models)
        self.router = router
        self.rates = rates
        self.config = causal_lm(peft_models[0]).config
        self._run_pass, self._draw = run_pass, draw
        # Looked up once: traversing thousands of modules takes the host as long as a small pass.
        self._layers = {peft_model: lora_layers(peft_model) for peft_model in peft_models}
        for agent in self.agents:
            peft_model = self.peft_model(agent)
            matrices = take_matrices(peft_model, self._layers[peft_model], agent, shape)
            self.layout = Layout({key: matrix.shape for key, matrix in matrices.items()})  # one for all
            self.register_parameter(adapter_name(agent), nn.Parameter(self.layout.join(matrices)))
        self._noise: Noise | None = None
        device = self.adapters()[self.agents[0]].device
        is_B_F = self.layout.is_B(device) if shape.has_unlike_scalings else None
        self._factors_of = partial(factors_of, shape, is_B_F)
        self.train()

    def forward(self, batch: Batch, step: int | None = None, slot: int = 0) -> AgentOutput:
        """One pass of every agent over one batch.

        Args:
            batch: the rows, shared by all agents or one set for each.
            step: the optimiser step, which names this pass's random draws. None is evaluation: no
                DropConnect, no dropout.
            slot: which micro-batch of which process within the step.
        """
        raise NotImplementedError

    def peft_model(self, agent: int) -> PeftModel:
        """The PeftModel that holds this agent's adapter."""
        raise NotImplementedError

    @contextmanager
    def trunk(self, agent: int | None) -> Iterator[nn.Module]:
        """The trunk with one agent's adapter in it, or the base alone (None), without training's noise."""
        agents = () if agent is None else (agent,)
        flat_1F = self.weights(agents) if agents else None
        with self._adapter_context(agents, flat_1F, num_tokens=0, noise=None) as trunk:
            yield trunk

    def weights(self, members: Sequence[int | None], noise: Noise | None = None) -> Tensor:
        """flat_KF, in the base's dtype: the weights of these members in a pass. None, the base, has zeros."""
        own, dtype = self.adapters(), causal_lm(self.peft_model(self.agents[0])).dtype
        zero_F = torch.zeros_like(own[self.agents[0]]) if None in members else torch.empty(0)
        adapters = [zero_F if member is None else own[member] for member in members]
        return stack(adapters, dtype, [self._factors_of(member, noise) for member in members])

    @contextmanager
    def _adapter_context(
        self, agents: tuple[int, ...], flat_KF: Tensor | None, num_tokens: int, noise: Noise | None
    ) -> Iterator[nn.Module]:
        peft_model = self.peft_model(agents[0] if agents else self.agents[0])
        context = BASE_ALONE
        if flat_KF is not None:
            context = adapter_context(
                self._layers[peft_model], self.layout, agents, flat_KF, num_tokens, noise
            )
        with self.router.of(context):
            yield trunk_of(causal_lm(peft_model))

    def head(self) -> Head:
        """The output layer, one for all agents."""
        return head_of(causal_lm(self.peft_model(self.agents[0])))

    def adapters(self) -> dict[int, nn.Parameter]:
        """All that is trained: each agent's adapter_F, laid out by `layout`, the agents in order."""
        return {agent: getattr(self, adapter_name(agent)) for agent in self.agents}

    @contextmanager
    def also_holding(self, others: Mapping[int, Tensor]) -> Iterator[None]:
        """The context in which agents of other processes, given by their flat adapters, are held too."""
        own = self.agents
        for agent, flat_F in others.items():
            self.register_parameter(adapter_name(agent), nn.Parameter(flat_F, requires_grad=False))
        self.agents = tuple(sorted({*own, *others}))
        try:
            yield
        finally:
            self.agents = own
            for agent in others:
                delattr(self, adapter_name(agent))

    def named(self, flat: Mapping[int, Tensor]) -> dict[TensorId, Tensor]:
        """Views of flat tensors laid out as the agents' adapters are, by identity, in the model's order."""
        return {
            TensorId(agent, *key): view
            for agent, flat_F in flat.items()
            for key, view in self.layout.views(flat_F).items()
        }

    def joined(self, tensors: Mapping[TensorId, Tensor]) -> dict[int, Tensor]:
        """New flat tensors, one an agent: the counterpart of `named`."""
        return {
            agent: self.layout.join({key: tensors[TensorId(agent, *key)] for key in self.layout.shapes})
            for agent in self.agents
        }

    def adapter_tensors(self) -> dict[TensorId, Tensor]:
        """Every trained matrix by identity: views of the adapters, to read and write, without gradients."""
        return self.named({agent: adapter_F.detach() for agent, adapter_F in self.adapters().items()})

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the base, each once."""
        return dict(base_tensors(causal_lm(self.peft_model(self.agents[0]))))

    def agent_pass(self, agent: int | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """nll_BT and hidden_BTD of one agent, or of the base (None), without training's noise."""
        nll_1BT, hidden_1BTD = self.joint_pass(() if agent is None else (agent,), batch, None)
        return nll_1BT[0], hidden_1BTD[0]

    def joint_pass(self, agents: tuple[int, ...], batch: Batch, noise: Noise | None) -> AgentOutput:
        """One pass of these agents together through one trunk, agent-major; without agents, of the base as
        one member.

        With one sample in each row there is no attention mask: padding is on the right, after every target.
        """
        K = max(len(agents), 1)
        first = self.agents.index(agents[0]) if agents else 0  # the agents of a pass are consecutive
        own = range(first, first + K)

        def run(rows: Rows, flat_KF: Tensor | None, masks: Any) -> Tensor:
            places = {} if rows.position_NT is None else {"position_ids": rows.position_NT}
            if masks is None and rows.sample_NT is not None:
                masks = masks_of(causal_lm(self.peft_model(self.agents[0])), rows)
            with self._adapter_context(agents, flat_KF, rows.ids_NT.numel(), noise) as trunk:
                output = trunk(input_ids=rows.ids_NT, attention_mask=masks, use_cache=False, **places)
            return output.last_hidden_state

        with span("_".join(["forward_pass.agent", *map(str, agents)])):
            rows = Rows(*batch.inputs_of(own))
            N, T = rows.ids_NT.shape
            flat_KF = self.weights(agents, noise) if agents else None
            if self._run_pass is not None and self.training and flat_KF is not None:
                # The agents' weights are an argument: one capture serves every group of as many agents.
                key = (self.peft_model(agents[0]), K, N, T, rows.sample_NT is None)
                hidden_NTD = self._run_pass(key, run, rows, flat_KF)
            else:
                hidden_NTD = run(rows, flat_KF, None)
        with span("task_loss"):
            targets = batch.rows_of(own, batch.target_BT), batch.target_rows_of(own)
            nll_NT = token_nll(hidden_NTD, *targets, self.head())
        return AgentOutput(nll_NT.view(K, -1, T), hidden_NTD.unflatten(0, (K, -1)))

    def _noise_of(self, step: int | None, slot: int) -> Noise | None:
        """The draws of this pass. Masks are drawn once a step and kept for its other micro-batches."""
        rates = self.rates
        if step is None or rates.is_off:
            return None
        if self._noise is None or self._noise.step != step:
            self._noise = self._draw(self.adapters(), rates, step)
        return replace(self._noise, slot=slot)


class GroupedAgents(Agents):
    """Groups of agents through one PeftModel, each group in one pass.

    Args:
        parts: the arguments of `Agents`.
        groups: the agents in order, cut into groups.
        is_recomputed: backward recomputes the activations of several groups, one group at a time.
    """

    def __init__(self, *parts: Any, groups: Sequence[tuple[int, ...]], is_recomputed: bool):
        super().__init__(*parts)
        self.groups, self.is_recomputed = groups, is_recomputed

    def peft_model(self, agent: int) -> PeftModel:
        return self.peft_models[0]  # pyright: ignore[reportReturnType]

    def forward(self, batch: Batch, step: int | None = None, slot: int = 0) -> AgentOutput:
        noise = self._noise_of(step, slot)
        if len(self.groups) == 1:
            return self.joint_pass(self.agents, batch, noise)
        adapters, outputs = self.adapters(), []
        for group in self.groups:
            if self.is_recomputed:
                own = [adapters[agent] for agent in group]
                outputs.append(recomputed(lambda group=group: self.joint_pass(group, batch, noise), own))
            else:
                outputs.append(self.joint_pass(group, batch, noise))
        return AgentOutput(*map(torch.cat, zip(*outputs, strict=True)))


class ParallelAgents(Agents):
    """K PeftModels over one storage: each agent has a module tree of its own, no adapter is ever switched."""

    def peft_model(self, agent: int) -> PeftModel:
        # Within `also_holding` there are more agents than trees; any tree can run any agent's weights.
        place = self.agents.index(agent) % len(self.peft_models)
        return self.peft_models[place]  # pyright: ignore[reportReturnType]

    def forward(self, batch: Batch, step: int | None = None, slot: int = 0) -> AgentOutput:
        noise = self._noise_of(step, slot)
        outputs = [self.joint_pass((agent,), batch, noise) for agent in self.agents]
        return AgentOutput(*map(torch.cat, zip(*outputs, strict=True)))
