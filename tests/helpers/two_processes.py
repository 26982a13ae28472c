"""Runs of two processes in which one agent fails, and what must hold of them."""

import json
import math
import re
from pathlib import Path

import torch
from isolation_worker import BROKEN, BROKEN_STEP, CASES, CONFIG, STEPS, rows_of_step
from preloaded import forked
from torch import Tensor
from toy import toy_agents

from chorus.model.adapters import TensorId
from chorus.training.state import TrainingState

# Of a weight: AdamW divides by gradients near zero. A step that is wrongly taken or left out moves 1e-2.
ROUNDING = 2e-5


def tensors_of(state: TrainingState, agent: int) -> dict[tuple, Tensor]:
    """Weights and moments of one agent."""
    kinds = {"weight": state.weights, **state.moments}
    return {
        (kind, *identity[1:]): tensor
        for kind, tensors in kinds.items()
        for identity, tensor in tensors.items()
        if identity.agent == agent
    }


def are_equal(one: TrainingState, other: TrainingState, agent: int) -> bool:
    ours, theirs = tensors_of(one, agent), tensors_of(other, agent)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def lone_run(agent: int, num_steps: int, skip_non_finite: int | None = None) -> dict[TensorId, Tensor]:
    """The agent alone on a base of its own, under stock AdamW, without one of the steps."""
    agents, all_agents = toy_agents("sequential", num_agents=1), toy_agents("sequential")
    agents.adapters()[0].data.copy_(all_agents.adapters()[agent])
    optimizer = torch.optim.AdamW(agents.adapters().values(), lr=CONFIG.lr, weight_decay=CONFIG.weight_decay)
    for step in range(num_steps):
        if step != skip_non_finite:
            batch = rows_of_step(step)
            (agents(batch, step=step).nll_KBT.sum() / len(batch.target_rows_N)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return {identity._replace(agent=agent): tensor for identity, tensor in agents.adapter_tensors().items()}


def check_isolated(states: list[TrainingState], facts: dict) -> None:
    """Against lone runs; and bitwise, that the step was none for the agent."""
    assert are_equal(states[BROKEN_STEP], states[BROKEN_STEP - 1], BROKEN)
    assert not are_equal(states[BROKEN_STEP], states[BROKEN_STEP + 1], BROKEN)
    assert states[-1].optimizer_step == [STEPS, STEPS - 1, STEPS]
    for agent in range(3):
        for identity, tensor in lone_run(agent, STEPS, BROKEN_STEP if agent == BROKEN else None).items():
            assert torch.allclose(states[-1].weights[identity], tensor, rtol=0, atol=ROUNDING), identity
    assert (facts["skipped"], facts["skips_in_a_row"]) == (1, 0)
    assert math.isfinite(facts["grad_norm"])


def check_two_processes(command: list[str], folder: Path, json_file: str | None = None) -> None:
    result = forked(
        [*command[:-1], "tests/helpers/isolation_worker.py"], str(folder), *([json_file] if json_file else [])
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for precision, mode, kinds in CASES if json_file is None else CASES[:1]:
        runs = {
            kind: torch.load(folder / f"{precision}-{mode}-{kind}.pt", weights_only=False)
            for kind in (None, *kinds)
        }
        sound, _ = runs.pop(None)
        for kind, (states, facts) in runs.items():
            assert all(are_equal(states[-1], sound[-1], agent) for agent in (0, 2)), (precision, mode, kind)
            if kind != "x 1000" and precision == "no":
                check_isolated(states, facts)
            elif kind != "x 1000":
                assert are_equal(states[BROKEN_STEP], states[BROKEN_STEP - 1], BROKEN), (mode, kind)
                assert states[-1].optimizer_step == [STEPS, STEPS - 1, STEPS]
    check_beside(folder)


def check_beside(folder: Path) -> None:
    """Further results of the worker, of collectives.py, to spare a start: every process group has the timeout
    that was asked for, and processes with different tensors are refused, on both with the same words."""
    for process in (0, 1):
        timeouts = json.loads((folder / f"timeouts_{process}.json").read_text())
        assert (
            len(timeouts) >= 2
        )  # all processes', DeepSpeed's own, and the one that `StopRequest` has beside NCCL
        assert set(timeouts.values()) == {777.0}, timeouts
        order, adapter, base = (
            (folder / f"{what}_{process}").read_text() for what in ("order", "adapter", "base")
        )
        tensor = r"tensor \d+ is"
        q_proj = r"base_model.model.model.layers.0.self_attn.q_proj \(A\) \[3, 32\] of values \w{8}"
        down_proj = r"base_model.model.model.layers.1.mlp.down_proj \(B\) "
        assert re.match(rf"{tensor} agent 2, {q_proj}, but agent 1, {q_proj} on the first process; ", order)
        assert re.match(rf"{tensor} agent 2, {down_proj}", adapter)
        assert re.match(rf"{tensor} peft_models.0.base_model.model.model.norm.weight ", base)
