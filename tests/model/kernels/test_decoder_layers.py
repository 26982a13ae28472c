"""Compiled layers, in training and out of it. What they compute is held by the promises of test_agents.py."""

from typing import get_args

import pytest
import torch
from promises import EXACT, run
from torch import nn
from torch.profiler import ProfilerActivity, profile
from toy import RANK, max_difference, tiny_gemma, toy_agents, toy_batch
from transformers import PreTrainedModel

from chorus.errors import InputError, RunError
from chorus.model.adapters import AdapterRouter, lora_layers
from chorus.model.kernels.decoder_layers import Recompute, prepare_layers

# All of torch.compile but its last part, which takes half a minute for a layer on two cores.
QUICK = "aot_eager"


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet():
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_compiled_layers_give_the_same_values_and_gradients_at_every_length(recompute: Recompute):
    plain = toy_agents("fused", dropconnect_p=0.4)
    compiled = toy_agents("fused", dropconnect_p=0.4, gradient_checkpointing=recompute, compiled=QUICK)
    for length in (10, 12):
        expected, expected_gradients = run(plain, toy_batch(length=length))
        output, gradients = run(compiled, toy_batch(length=length))
        assert max_difference(output.nll_KBT, expected.nll_KBT) < EXACT
        for identity, gradient in expected_gradients.items():
            assert max_difference(gradients[identity], gradient) < EXACT, identity


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_equal_layers_are_compiled_once_and_without_a_break(recompute: Recompute):
    """Two layers of the toy differ in their attention; a second
    pair of them brings no further compilation."""

    def compilations(num_layers: int) -> int:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        base = tiny_gemma()
        layers = base.model.layers
        layers.extend([tiny_gemma(seed=seed).model.layers[seed % 2] for seed in range(2, num_layers)])
        base.config.layer_types = [["sliding_attention", "full_attention"][k % 2] for k in range(num_layers)]
        base.config.num_hidden_layers = num_layers
        prepare_layers(base, AdapterRouter(), recompute=recompute, compiled=QUICK)
        base.train()(input_ids=toy_batch().input_BT, use_cache=False)
        assert not torch._dynamo.utils.counters["graph_break"]
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert compilations(6) == compilations(2) > 0


def test_what_cannot_be_compiled_is_an_error_and_no_silent_return_to_slow_layers(
    monkeypatch: pytest.MonkeyPatch,
):
    agents = toy_agents("fused", compiled=QUICK)
    agents(toy_batch(length=6))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)  # a sliding and a full layer
    with pytest.raises(RunError, match="key 'compile': more than 2 kinds of layers and lengths"):
        agents(toy_batch(length=7))
    base = tiny_gemma().train()
    base.model.layers[0].mlp.forward = lambda x: torch._dynamo.graph_break() or x
    prepare_layers(base, AdapterRouter(), recompute="none", compiled=QUICK)
    with pytest.raises(
        RunError, match=r"'compile': Gemma2DecoderLayer cannot be compiled whole: .+; set it to false"
    ):
        base(input_ids=toy_batch().input_BT, use_cache=False)


def test_evaluation_compiles_nothing():
    torch._dynamo.utils.counters.clear()
    agents = toy_agents("fused", compiled=QUICK).eval()
    with torch.no_grad():
        agents.agent_pass(0, toy_batch())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def test_selective_keeps_the_results_of_products_and_nothing_more_than_full():
    """Bytes that a forward pass allocates and does not give back: what its backward pass needs."""
    batch = toy_batch(rows=2, length=48)

    def kept(recompute: Recompute) -> int:
        agents = toy_agents("fused", gradient_checkpointing=recompute)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            output = agents(batch)
        del output
        return sum(event.self_cpu_memory_usage for event in profiler.key_averages())

    linears = lora_layers(toy_agents("fused").peft_model(0)).values()
    of_a_token = sum(linear.base_layer.out_features + RANK for linear in linears)
    assert kept("selective") - kept("full") == 4 * 3 * batch.input_BT.numel() * of_a_token
    assert kept("none") > 2 * kept("selective")


@pytest.mark.parametrize(
    ("key", "off", "wanted"),
    [
        ("gradient_checkpointing", "none", {"recompute": "selective", "compiled": False}),
        ("compile", "false", {"recompute": "none", "compiled": True}),
    ],
)
def test_a_base_without_marked_layers_is_refused_by_the_key(key: str, off: str, wanted: dict):
    class Odd(PreTrainedModel):
        def __init__(self):
            nn.Module.__init__(self)

    with pytest.raises(InputError, match=f"key '{key}': Odd does not support it; set it to {off}"):
        prepare_layers(Odd(), AdapterRouter(), **wanted)
