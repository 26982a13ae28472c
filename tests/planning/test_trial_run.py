"""What is told from a few steps: each finding on agents that have the fault, and on agents that have not."""

import copy

import torch
from toy import tiny_gemma, toy_agents

from chorus.config import RunConfig
from chorus.model.adapters import TensorId
from chorus.model.execution import Execution
from chorus.planning.trial_run import (
    ModeRun,
    agents_of,
    bits_of,
    checksums_of,
    disagreement,
    growth,
    not_shared_tensors,
    unmoved,
)


def run_of(losses: list[list[float]]) -> ModeRun:
    return ModeRun("fused", losses, 0.1, 0, "plain", {}, [], [], 0, [])


def test_one_bit_of_the_base_is_noticed():
    agents = toy_agents("fused")
    before = checksums_of(agents)
    assert checksums_of(agents) == before
    name, tensor = next(
        (name, tensor) for name, tensor in agents.frozen_tensors().items() if tensor.ndim == 2
    )
    tensor.view(torch.int32)[1, 2] ^= 1
    assert [name for name, value in checksums_of(agents).items() if value != before[name]] == [name]
    assert bits_of(torch.tensor([True, False])) == 1
    assert bits_of(torch.ones(2, dtype=torch.bfloat16)) != bits_of(torch.zeros(2, dtype=torch.bfloat16))


def test_a_base_that_lies_elsewhere_for_one_agent_is_named():
    agents = toy_agents("parallel")
    assert not_shared_tensors(agents) == []
    (layer,) = (
        module for path, module in agents.peft_models[1].named_modules() if path.endswith("layers.1.mlp")
    )
    down = layer.down_proj.base_layer
    down.weight = torch.nn.Parameter(copy.deepcopy(down.weight), requires_grad=False)
    (found,) = not_shared_tensors(agents)
    assert found.startswith("agent 1: ")
    assert found.endswith("layers.1.mlp.down_proj.base_layer.weight")


def test_one_agent_more_takes_nothing_beyond_its_adapters_where_each_agent_has_values_of_its_own():
    config = RunConfig(
        num_agents=3, lambda_sw=0, lora_alpha=[1.0, 2.0, 3.0], lora_init_gain=[1.0, 2.0, 3.0], lora_rank=2
    )
    base = tiny_gemma()
    agents = agents_of(config, base, 3, Execution())
    assert growth(config, base, agents) == 0


def test_an_agent_whose_b_stays_is_counted_for_itself():
    before = {
        TensorId(agent, path, matrix): torch.zeros(2) for agent in (0, 1) for path in "xy" for matrix in "AB"
    }  # pyright: ignore
    after = {identity: tensor + 1 for identity, tensor in before.items()}
    after[TensorId(1, "x", "B")] = torch.zeros(2)
    after[TensorId(0, "x", "A")] = torch.zeros(2)  # without a gradient while B is zero
    assert unmoved(before, after) == {0: 0, 1: 1}


def test_modes_disagree_by_their_largest_difference():
    first, other = run_of([[2.0, 1.0], [1.0, 1.0]]), run_of([[2.0, 1.0], [1.0, 1.01]])
    assert disagreement([first]) == 0
    assert abs(disagreement([first, other]) - 0.01) < 1e-12
