"""What every mode promises, for the tests that hold a mode to it."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy import (
    ALPHA,
    RANK,
    TARGETS,
    max_difference,
    run,
    tiny_gemma,
    toy_batch,
)

from chorus.config.execution import MODES
from chorus.config.per_agent import NumberOrList, of_agent
from chorus.data.batches import Batch
from chorus.model.adapters import TensorId
from chorus.model.agents import Agents

EVERY_MODE = pytest.mark.parametrize("mode", MODES)
# fp32 rounding: sums of a few hundred terms in another order
EXACT = 2e-5


def lone_run(
    agents: Agents,
    agent: int,
    batch: Batch,
    base: Callable = tiny_gemma,
    targets: Sequence[str] | str = TARGETS,
    alpha: float = ALPHA,
) -> dict[str, Tensor]:
    """Gradients of one agent by stock PEFT and stock loss, in a model of its own: no Chorus code."""
    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base(), config)
    parameters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    for identity, tensor in agents.adapter_tensors().items():
        if identity.agent == agent:
            parameters[f"{identity.path}.lora_{identity.matrix}.default.weight"].data.copy_(tensor)
    labels = batch.target_BT.masked_fill(~batch.mask_BT, -100)
    cross_entropy(model(input_ids=batch.input_BT).logits.flatten(0, 1), labels.flatten()).backward()
    return {name: tensor.grad for name, tensor in parameters.items()}


def assert_every_agent_gets_the_gradient_of_a_lone_run(
    agents: Agents, *stock: Any, alpha: NumberOrList = ALPHA
) -> None:
    batch = toy_batch()
    _, gradients = run(agents, batch, lambda_sw=0)
    for agent in agents.agents:
        lone = lone_run(agents, agent, batch, *stock, alpha=of_agent(alpha, agent))
        for name, expected in lone.items():
            path, matrix = name.removesuffix(".default.weight").rsplit(".lora_", 1)
            own = gradients[TensorId(agent, path, matrix)]
            assert own is not None, f"agent {agent} got no gradient at {path}"
            assert max_difference(own, expected) < EXACT, (agent, name)


def assert_a_forward_leaves_no_trace(agents: Agents) -> None:
    state = {name: tensor.clone() for name, tensor in agents.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in agents.named_parameters()}
    torch_state, python_state, turn = torch.random.get_rng_state(), random.getstate(), agents.router.context
    run(agents, toy_batch())
    assert all(torch.equal(state[name], tensor) for name, tensor in agents.state_dict().items())
    assert flags == {name: parameter.requires_grad for name, parameter in agents.named_parameters()}
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert python_state == random.getstate()
    assert turn == agents.router.context
