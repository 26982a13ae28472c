"""Which linears become one operator. test_lora_linear.py: what
it computes; test_decoder_layers.py: compiled layers."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from toy import toy_agents, toy_batch

from chorus.model.agents import Mode
from chorus.model.kernels.decoder_layers import Recompute
from chorus.model.kernels.joined_linears import joining
from chorus.model.kernels.lora_linear import ONE, SEVERAL, lora_linear

K, R = 2, 2


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """How many linears each operator of a compiled trace has, in order, trace by trace."""
    torch._dynamo.reset()
    joining.cache_clear()
    found: list[list[int]] = []

    def look(trace: GraphModule, example_inputs: list) -> GraphModule:
        parts = [part for part in trace.modules() if isinstance(part, GraphModule)]
        operators = [node for part in parts for node in part.graph.nodes if node.target in (ONE, SEVERAL)]
        found.append([1 if node.target == ONE else len(node.args[1]) for node in operators])
        return trace

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: look)
    yield found
    joining.cache_clear()


class Pair(nn.Module):
    def __init__(self, bias: bool = False, scalings: tuple[float, float] = (2.0, 2.0), apart: float = 0.0):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.biases = nn.ParameterList([torch.randn(4) for _ in range(2)]) if bias else [None, None]
        self.scalings, self.apart = scalings, apart

    def forward(self, x_NI: Tensor, A_KRI: Tensor, B_KOR: Tensor) -> list[Tensor]:
        inputs = (x_NI, x_NI + self.apart if self.apart else x_NI)
        operands = zip(inputs, self.weights, self.biases, self.scalings, strict=True)
        return [lora_linear(x.reshape(K, -1, 4), W, bias, A_KRI, B_KOR, s) for x, W, bias, s in operands]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (Pair(), [2]),
        (Pair(apart=1.0), [1, 1]),
        (Pair(bias=True), [1, 1]),
        (Pair(scalings=(2.0, 3.0)), [1, 1]),
    ],
    ids=["one-input", "two-inputs", "with-bias", "two-scalings"],
)
def test_linears_without_bias_and_of_one_input_and_scaling_are_joined_and_no_others(
    pair: Pair, expected: list[int], sizes: list[list[int]]
):
    inputs = torch.randn(K * 3, 4), torch.randn(K, R, 4), torch.randn(K, 4, R)
    alone = pair(*inputs)
    together = torch.compile(pair, fullgraph=True, backend=joining("eager"))(*inputs)
    assert sizes == [expected]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("mode", "recompute"),
    [
        ("fused", "none"),
        ("fused", "selective"),
        ("fused", "full"),
        ("sequential", "none"),
        pytest.param("parallel", "full", marks=pytest.mark.slow),  # every agent's layers are traced
    ],
)
def test_a_decoder_layer_runs_its_seven_linears_as_four_operators(
    mode: Mode, recompute: Recompute, sizes: list[list[int]]
):
    """Attention's q, k and v together, its output alone; an MLP's gate and up together, its down alone."""
    agents = toy_agents(mode, gradient_checkpointing=recompute, compiled=True)
    for length in (10, 12):
        agents(toy_batch(length=length))
    assert len(sizes) >= 2
    assert all(of_a_layer == [3, 1, 2, 1] for of_a_layer in sizes)
