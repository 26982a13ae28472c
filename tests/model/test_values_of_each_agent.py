"""Agents with an alpha, a dropout and a DropConnect rate of their own."""

from typing import get_args

import pytest
import torch
from promises import (
    EVERY_MODE,
    EXACT,
    assert_every_agent_gets_the_gradient_of_a_lone_run,
)
from toy import (
    ALPHA,
    max_difference,
    run,
    toy_agents,
    toy_batch,
)

from chorus.model.agents import Mode
from chorus.model.kernels.decoder_layers import Recompute

CHECKPOINTING = pytest.mark.parametrize("checkpointing", get_args(Recompute))


ALPHAS = [6.0, 15.0, 2.0]  # of three agents


@EVERY_MODE
@CHECKPOINTING
def test_agents_with_an_alpha_each_get_the_gradients_of_lone_runs_with_theirs(
    mode: Mode, checkpointing: Recompute
):
    agents = toy_agents(mode, gradient_checkpointing=checkpointing, alpha=ALPHAS)
    assert_every_agent_gets_the_gradient_of_a_lone_run(agents, alpha=ALPHAS)


@EVERY_MODE
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_an_agent_with_values_of_its_own_is_that_of_a_run_in_which_all_have_them(
    mode: Mode, checkpointing: Recompute
):
    """Masks and dropout of an agent do not depend on the others' probabilities, and alpha not on theirs."""
    lists = {"alpha": ALPHAS, "dropconnect_p": [0.4, 0.0, 0.2], "dropout_p": [0.0, 0.3, 0.1]}
    batch = toy_batch()
    output, gradients = run(
        toy_agents(mode, gradient_checkpointing=checkpointing, **lists), batch, lambda_sw=0
    )
    for agent in range(3):
        plain = toy_agents("parallel", **{key: values[agent] for key, values in lists.items()})
        expected, expected_gradients = run(plain, batch, lambda_sw=0)
        assert max_difference(output.nll_KBT[agent], expected.nll_KBT[agent]) < EXACT
        for identity, gradient in gradients.items():
            if identity.agent == agent:
                assert max_difference(gradient, expected_gradients[identity]) < EXACT, identity


def test_alphas_apart_by_powers_of_two_change_no_bit_in_bf16():
    alphas = [ALPHA, 4 * ALPHA, ALPHA / 2]
    batch = toy_batch()
    output, gradients = run(toy_agents("fused", dtype=torch.bfloat16, alpha=alphas), batch, lambda_sw=0)
    for agent, alpha in enumerate(alphas):
        plain = toy_agents("fused", dtype=torch.bfloat16, alpha=alpha)
        expected, expected_gradients = run(plain, batch, lambda_sw=0)
        assert torch.equal(output.nll_KBT[agent], expected.nll_KBT[agent])
        for identity, gradient in gradients.items():
            if identity.agent == agent:
                assert torch.equal(gradient, expected_gradients[identity]), identity
