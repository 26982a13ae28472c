"""The promises of test_agents.py on a GPU, in fp32 and bf16, compiled, captured and packed: a few minutes."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import get_args

import pytest
import torch
from promises import MODES, run
from rounding import AS_EXACT, total_error, typical_error
from torch import Tensor
from toy import ALPHA, toy_agents, toy_samples

from chorus.config.per_agent import NumberOrList
from chorus.data.batches import collate, collate_apart
from chorus.model.agents import Agents, Mode
from chorus.model.kernels.decoder_layers import Recompute

FLEX_HEAD_DIM = 16  # its kernels have no smaller
UNCOMPILED = [*product(MODES, get_args(Recompute), (0.4,), ({}, {"captured": True}))]
COMPILED = [  # each compiles for some ten seconds
    *product(
        ["fused"], get_args(Recompute), (0.4,), ({"compiled": True}, {"compiled": True, "captured": True})
    ),
    *product(["sequential", "parallel"], ["full"], (0.0,), ({"compiled": True, "captured": True},)),
]
ON_A_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16]),
)


def on_a_gpu(test: Callable) -> Callable:
    for mark in ON_A_GPU:
        test = mark(test)
    return test


@on_a_gpu
@pytest.mark.parametrize(
    ("mode", "checkpointing", "dropconnect_p", "execution"), [*UNCOMPILED, *COMPILED], ids=str
)
def test_every_mode_and_execution_is_exact_on_the_gpu(
    mode: Mode, checkpointing: Recompute, dropconnect_p: float, dtype: torch.dtype, execution: dict
):
    settings = {"dtype": dtype, "device": "cuda", "dropconnect_p": dropconnect_p}
    agents = toy_agents(mode, gradient_checkpointing=checkpointing, **settings, **execution)
    assert_as_exact_as_plain_agents(agents, **settings)


@on_a_gpu
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@pytest.mark.parametrize("execution", [{}, {"compiled": True, "captured": True}], ids=str)
def test_packed_samples_are_exact_on_the_gpu(attention: str, execution: dict, dtype: torch.dtype):
    agents = toy_agents(
        "fused", dtype=dtype, device="cuda", attention=attention, head_dim=FLEX_HEAD_DIM, **execution
    )
    assert_as_exact_as_plain_agents(agents, dtype, "cuda", 0.0, packing=40, head_dim=FLEX_HEAD_DIM)


@on_a_gpu
@pytest.mark.parametrize("execution", [{}, {"compiled": True, "captured": True}], ids=str)
def test_agents_with_values_of_their_own_are_exact_on_the_gpu(execution: dict, dtype: torch.dtype):
    values = {"dropconnect_p": (0.4, 0.0, 0.2), "alpha": (ALPHA, 2.5 * ALPHA, 2.0)}
    agents = toy_agents("fused", dtype=dtype, device="cuda", **values, **execution)
    assert_as_exact_as_plain_agents(agents, dtype, "cuda", **values)


@on_a_gpu
@pytest.mark.parametrize("packing", [None, 40])
@pytest.mark.parametrize("execution", [{"captured": True}, {"compiled": True, "captured": True}], ids=str)
def test_rows_of_each_agents_own_are_exact_on_the_gpu(
    execution: dict, packing: int | None, dtype: torch.dtype
):
    agents = toy_agents("fused", dtype=dtype, device="cuda", **execution)
    assert_as_exact_as_plain_agents(agents, dtype, "cuda", 0.0, packing, has_own_rows=True)


def assert_as_exact_as_plain_agents(
    agents: Agents,
    dtype: torch.dtype,
    device: str,
    dropconnect_p: NumberOrList,
    packing: int | None = None,
    head_dim: int = 8,
    alpha: NumberOrList = ALPHA,
    has_own_rows: bool = False,
) -> None:
    """Losses and gradients against plain fp32; in bf16 to `AS_EXACT` times the error of plain bf16.

    Over eight batches, see `rounding`: a capture is so also replayed, with other rows than its own.
    """
    expected, allowed = (
        plain_results(one, device, dropconnect_p, head_dim, alpha, has_own_rows)
        for one in (torch.float32, dtype)
    )
    found = results(agents, device, packing, has_own_rows)
    for name, exact in expected.items():
        if dtype == torch.float32:
            assert total_error(found[name], exact) < 1e-4, name
        else:
            limit = AS_EXACT * typical_error(allowed[name], exact) + 1e-4
            assert typical_error(found[name], exact) < limit, name


@cache
def plain_results(
    dtype: torch.dtype,
    device: str,
    dropconnect_p: NumberOrList,
    head_dim: int,
    alpha: NumberOrList,
    has_own_rows: bool,
) -> dict[str, list[Tensor]]:
    how = {"dropconnect_p": dropconnect_p, "head_dim": head_dim, "alpha": alpha}
    agents = toy_agents("parallel", dtype=dtype, device=device, **how)
    return results(agents, device, None, has_own_rows)


def results(agents: Agents, device: str, packing: int | None, has_own_rows: bool) -> dict[str, list[Tensor]]:
    """Of each of eight steps the agents' losses and, agent by agent, all gradients in one."""
    steps = []
    for step in range(8):
        batch = collate(toy_samples(4, 20, seed=step), 0, 20, 3, packing)
        if has_own_rows:
            own = [toy_samples(4, 20, seed=10 * step + agent) for agent in agents.agents]
            batch = collate_apart(own, 0, 20, packing)
        lambda_sw = 0.0 if has_own_rows else 0.5
        output, gradients = run(agents, batch.to(device), step, lambda_sw)
        of_agents = {
            f"agent {k}": torch.cat([g.flatten() for identity, g in gradients.items() if identity.agent == k])
            for k in agents.agents
        }
        steps.append({"loss": output.nll_KBT.detach().sum((1, 2))} | of_agents)
    return {name: [one[name].float() for one in steps] for name in steps[0]}
