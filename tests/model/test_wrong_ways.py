"""The wrong ways, put in: the checks of test_agents.py must refuse each of them."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from promises import assert_a_forward_leaves_no_trace, assert_every_agent_gets_the_gradient_of_a_lone_run
from torch.nn.functional import cross_entropy
from toy import ALPHA, RANK, TARGETS, tiny_gemma, toy_agents

from chorus.data.batches import Batch
from chorus.model import agents as agents_module
from chorus.model.adapters import AdapterRouter, TensorId, adapter_context, adapter_name, lora_layers
from chorus.model.agents import AgentOutput, Agents, GroupedAgents, ParallelAgents, Regularisation
from chorus.model.flat_adapter import stack
from chorus.model.regularisation import Noise


class _StockForward(Agents):
    """What people write: stock PEFT layers, the adapter in force chosen by `set_adapter`."""

    def joint_pass(self, agents: tuple[int, ...], batch: Batch, noise: Noise | None) -> AgentOutput:
        model = self.peft_model(agents[0])
        output = model(input_ids=batch.input_BT, output_hidden_states=True)
        nll_BT = cross_entropy(output.logits.transpose(1, 2), batch.target_BT, reduction="none")
        return AgentOutput((nll_BT * batch.mask_BT)[None], output.hidden_states[-1][None])


def stock_adapter(model, agent: int):
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return get_peft_model(model, config, adapter_name=adapter_name(agent))


def k_peft_models_over_one_base_object(monkeypatch: pytest.MonkeyPatch) -> Agents:
    class Wrong(_StockForward, ParallelAgents):
        pass

    base = tiny_gemma()
    return as_agents(Wrong, [stock_adapter(base, agent) for agent in range(3)])


def switching_adapters_before_one_backward(monkeypatch: pytest.MonkeyPatch) -> Agents:
    class Wrong(_StockForward, GroupedAgents):
        def forward(self, batch: Batch, step: int | None = None, slot: int = 0) -> AgentOutput:
            outputs = []
            for agent in self.agents:
                self.peft_model(agent).set_adapter(adapter_name(agent))
                outputs.append(self.joint_pass((agent,), batch, None))
            return AgentOutput(*map(torch.cat, zip(*outputs, strict=True)))  # pyright: ignore

    peft_model = stock_adapter(tiny_gemma(), 0)
    for agent in (1, 2):
        peft_model.add_adapter(adapter_name(agent), peft_model.peft_config["agent_0"])  # pyright: ignore
    return as_agents(Wrong, [peft_model])


def recomputing_under_the_adapter_of_backward(monkeypatch: pytest.MonkeyPatch) -> Agents:
    monkeypatch.setattr(AdapterRouter, "checkpoint_contexts", lambda self: (nullcontext(), nullcontext()))
    monkeypatch.setattr(agents_module, "recomputed", lambda run, parameters: run())
    agents = toy_agents("sequential", gradient_checkpointing="full")
    layers, weights = lora_layers(agents.peft_model(2)), agents.weights((2,))
    last_switched_to = adapter_context(layers, agents.layout, (2,), weights, 0, None)
    agents.router._take(last_switched_to)
    return agents


def as_agents(kind: type[Agents], peft_models: list) -> Agents:
    """Wrong agents behind the interface that the checks use."""

    class Reading(kind):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.agents, self.peft_models, self.router = (
                (0, 1, 2),
                torch.nn.ModuleList(peft_models),
                AdapterRouter(),
            )
            self.rates, self._run_pass, self._noise = Regularisation(0, 0, 0), None, None

        def adapters(self):
            return {}

        def named(self, flat):
            return {identity: tensor.grad for identity, tensor in self.adapter_tensors().items()}

        def adapter_tensors(self):
            return {
                TensorId(agent, path, matrix): getattr(layer, f"lora_{matrix}")[adapter_name(agent)].weight
                for agent in self.agents
                for path, layer in self.peft_model(agent).named_modules()
                if hasattr(layer, "lora_A")
                for matrix in ("A", "B")
            }

    agents = Reading()
    for number, tensor in enumerate(agents.adapter_tensors().values()):
        tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return agents


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrong_way",
    [
        k_peft_models_over_one_base_object,
        switching_adapters_before_one_backward,
        recomputing_under_the_adapter_of_backward,
    ],
)
def test_the_gradient_check_catches(wrong_way: Callable, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AssertionError):
        assert_every_agent_gets_the_gradient_of_a_lone_run(wrong_way(monkeypatch))


def test_the_trace_check_catches_dropconnect_in_place(monkeypatch: pytest.MonkeyPatch):
    def in_place(adapters, dtype, factors):
        for adapter_F, own in zip(adapters, factors, strict=True):
            adapter_F.data *= own.keep_F
        return stack(adapters, dtype)

    monkeypatch.setattr(agents_module, "stack", in_place)
    with pytest.raises(AssertionError):
        assert_a_forward_leaves_no_trace(toy_agents("parallel", dropconnect_p=0.4))
