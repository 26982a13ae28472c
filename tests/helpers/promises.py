"""What every mode promises, for the tests that hold a mode to it."""

import random
from collections.abc import Callable, Sequence
from functools import cache
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
    gradients_of,
    max_difference,
    run,
    tiny_gemma,
    toy_agents,
    toy_batch,
    toy_samples,
)

from chorus.config import Config
from chorus.config.execution import MODES
from chorus.config.per_agent import NumberOrList, of_agent
from chorus.data.batches import Batch, training_steps
from chorus.data.bootstrap import bootstrap_weights
from chorus.data.order import epoch_order
from chorus.mesh import ALONE
from chorus.model.adapters import TensorId
from chorus.model.agents import Agents
from chorus.training.objective import objective_of

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


ROWS_OF_A_STEP = 8
SAMPLES = toy_samples(12)


def settings_of_rows(bootstrap: str, per_agent_batches: bool, **keys: Any) -> Config:
    """A step of 8 rows in two micro-batches, of the 12 toy samples."""
    of_rows = {"bootstrap": bootstrap, "per_agent_batches": per_agent_batches, "lambda_sw": 0}
    return Config.model_validate(
        {"batch_size": ROWS_OF_A_STEP // 2, "gradient_accumulation_steps": 2, "max_seq_length": 20}
        | {"seed": 5, **of_rows, **keys}
    )


def assert_every_agent_learns_its_rows_with_their_weights(agents: Agents, config: Config) -> None:
    """Loss and gradients of a step against `lone_step`, which has one sample a pass and no Chorus loss."""
    where = {"points_per_row": 1, "pad_id": 0, "process_index": 0, "num_processes": 1, "num_steps": 1}
    [step] = training_steps(SAMPLES, config, config, agents=agents.agents, **where)
    loss_fn, nll_K = objective_of(config, config, ALONE), torch.zeros(len(agents.agents))
    for slot, batch in enumerate(step.micro_batches):
        output = agents(batch, step=0, slot=slot)
        part = loss_fn(*output, batch, num_targets=step.num_targets, step=0)
        part.share.backward()
        nll_K += part.nll_K
    gradients = gradients_of(agents)
    for place, agent in enumerate(agents.agents):
        expected, loss = lone_step(agent, config.bootstrap, config.per_agent_batches)
        assert float(nll_K[place]) / step.num_targets == pytest.approx(loss, rel=EXACT), agent
        for (path, matrix), gradient in expected.items():
            assert max_difference(gradients[TensorId(agent, path, matrix)], gradient) < EXACT, (agent, path)


@cache
def lone_step(agent: int, bootstrap: Any, has_own_rows: bool) -> tuple[dict[tuple, Tensor], float]:
    """Gradients by path and matrix, and loss, of one agent's step by stock PEFT, in float64."""
    config = settings_of_rows(bootstrap, has_own_rows)
    rows = epoch_order(len(SAMPLES), config.seed, 0, True, agent if has_own_rows else None)[:ROWS_OF_A_STEP]
    weight_N = torch.ones(len(SAMPLES))
    if bootstrap != "none":
        num_targets_N = torch.tensor([sample.num_targets for sample in SAMPLES])
        [weight_N] = bootstrap_weights(bootstrap, config.seed, [agent], num_targets_N)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(tiny_gemma().double(), lora)
    model.train()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    for identity, tensor in toy_agents("parallel").adapter_tensors().items():
        if identity.agent == agent:
            trained[f"{identity.path}.lora_{identity.matrix}.default.weight"].data = tensor.double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows.tolist():
        ids, is_target = SAMPLES[row]
        labels = ids.masked_fill(~is_target, -100)[1:]
        logits = model(input_ids=ids[None, :-1]).logits[0].double()
        total = total + weight_N[row].double() * cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    gradients = {}
    for name, tensor in trained.items():
        path, matrix = name.removesuffix(".default.weight").rsplit(".lora_", 1)
        gradients[path, matrix] = tensor.grad
    return gradients, total.item() / count


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
