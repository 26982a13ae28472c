"""A non-finite loss or gradient of one agent leaves the other agents as if it had not been there."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from isolation_worker import BROKEN, CONFIG, STEPS, clone, fault, mend, rows_of_step, run, take_step
from launching import ddp
from toy import toy_agents
from two_processes import ROUNDING, are_equal, check_isolated, check_two_processes, lone_run

from chorus.config import Config
from chorus.config.execution import MODES
from chorus.training.engine import Engine, start_engine
from chorus.training.nonfinite import SkippedUpdates
from chorus.training.state import read_state, restore_state
from chorus.training.step import StepDone

FAULTS = ["forward", "loss", "gradient"]


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def plain_engine(mode="fused", config: Config = CONFIG, **more) -> Engine:
    AcceleratorState._reset_state(reset_partial_state=True)
    return start_engine(Accelerator(cpu=True), toy_agents(mode, **more), config)


# ---- one agent's fault, and the others ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_of_one_agent_skips_its_update_wholly_and_leaves_every_lone_run(kind: str, mode: str):
    states, facts = run(plain_engine(mode), CONFIG, kind)
    check_isolated(states, facts)


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_or_a_thousandfold_loss_of_one_agent_changes_no_bit_of_another(mode: str):
    sound, _ = run(plain_engine(mode), CONFIG)
    for kind in (*FAULTS, "x 1000"):
        states, _ = run(plain_engine(mode), CONFIG, kind)
        assert all(are_equal(states[-1], sound[-1], agent) for agent in (0, 2)), kind
        assert not are_equal(states[-1], sound[-1], BROKEN)


@pytest.mark.parametrize("mode", MODES)
def test_an_agent_with_infinite_weights_harms_no_other_in_the_pass_that_they_share(mode: str):
    """Through the trunk itself, forward, recomputed and backward."""
    engine = plain_engine(mode, gradient_checkpointing="full")
    tensors = engine.agents.adapter_tensors()
    for identity, tensor in tensors.items():
        if identity.agent == BROKEN:
            tensor[0, 0] = math.inf
    broken = {identity: tensor.clone() for identity, tensor in tensors.items() if identity.agent == BROKEN}
    states, facts = run(engine, CONFIG)
    assert (facts["skipped"], facts["skips_in_a_row"]) == (STEPS, STEPS)
    assert all(torch.equal(states[-1].weights[identity], tensor) for identity, tensor in broken.items())
    for agent in (0, 2):
        for identity, tensor in lone_run(agent, STEPS).items():
            assert torch.allclose(states[-1].weights[identity], tensor, rtol=0, atol=ROUNDING), identity


def test_the_norm_and_the_clipping_are_those_of_the_agents_that_are_stepped():
    config = CONFIG.model_copy(update={"max_grad_norm": 0.05})
    engine = plain_engine("fused", config)
    fault("gradient", engine)
    done = take_step(engine, config, 0)
    adapters = {agent: own for agent, own in toy_agents("fused").adapters().items() if agent != BROKEN}
    batch = rows_of_step(0)
    for adapter_F in adapters.values():
        alone = toy_agents("sequential", num_agents=1)
        alone.adapters()[0].data.copy_(adapter_F)
        (alone(batch, step=0).nll_KBT.sum() / len(batch.target_rows_N)).backward()
        adapter_F.grad = alone.adapters()[0].grad
    norm = torch.nn.utils.clip_grad_norm_(adapters.values(), config.max_grad_norm)
    assert float(norm) > config.max_grad_norm
    assert float(done.result.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    first_moment = read_state(engine).moments["exp_avg"]
    for agent, moment_F in engine.agents.joined(first_moment).items():
        if agent != BROKEN:
            assert torch.allclose(moment_F, 0.1 * adapters[agent].grad, rtol=0, atol=1e-8)  # pyright: ignore


def test_with_the_distance_a_fault_takes_only_its_own_pairs_away():
    """The step without the agent's pairs: their weight stays, so
    lambda is that of 3 pairs, of which one is left."""
    config, three = CONFIG.model_copy(update={"lambda_sw": 0.3}), toy_agents("fused").adapters()
    for kind in ("forward", "loss"):
        engine = plain_engine("fused", config)
        fault(kind, engine)
        take_step(engine, config, 0)
        two = plain_engine("fused", config, num_agents=2)
        for agent, adapter_F in two.agents.adapters().items():
            adapter_F.data.copy_(three[2 * agent])
        # A pair's weight in the objective is K · lambda / pairs: 3 · 0.3 / 3 there, 2 · lambda / 1 here.
        take_step(two, config.model_copy(update={"lambda_sw": 0.15}), 0)
        ours, theirs = read_state(engine).moments["exp_avg"], read_state(two).moments["exp_avg"]
        for identity, tensor in theirs.items():
            own = ours[identity._replace(agent=2 * identity.agent)]
            assert torch.allclose(own, tensor, rtol=0, atol=1e-7), (kind, identity)


@pytest.mark.launch
def test_a_fault_on_one_of_two_processes_is_both_processes(tmp_path: Path):
    """Under DDP; test_partitions.py has DeepSpeed."""
    check_two_processes(ddp(2), tmp_path)


# ---- what is kept, said and allowed ----


def test_a_state_with_a_skipped_step_is_taken_up_as_it_was():
    engine = plain_engine("parallel")
    states, _ = run(engine, CONFIG, "gradient")
    resumed = plain_engine("fused", trained=False)
    restore_state(resumed, states[-1])
    state = read_state(resumed)
    assert state.optimizer_step == [STEPS, STEPS - 1, STEPS]
    assert all(are_equal(state, states[-1], agent) for agent in range(3))
    take_step(resumed, CONFIG, STEPS)
    assert read_state(resumed).optimizer_step == [STEPS + 1, STEPS, STEPS + 1]


def test_every_skip_is_said_with_agent_and_step(caplog: pytest.LogCaptureFixture):
    engine, skips = plain_engine(), SkippedUpdates(10, 0, "runs/x")
    with caplog.at_level(logging.INFO, "chorus"):
        skips.after_step(take_step(engine, CONFIG, 0))
        fault("forward", engine)
        skips.after_step(take_step(engine, CONFIG, 1))
        assert caplog.messages == []  # read a step later, without waiting for the device ...
        done = take_step(engine, CONFIG, 2)
        skips.after_step(done)
        assert len(caplog.messages) == 1
        skips.settle(done)  # ... but at once where the host waits anyway
        assert not done.ends_training
    first, second = caplog.messages
    assert "agent 1: loss or gradient is not finite at step 2 (gradient norm nan)" in first
    assert "at step 3" in second
    assert skips.take_count() == 2
    assert skips.take_count() == 0


@pytest.mark.parametrize("allowed", [0, 2])
def test_only_more_steps_in_a_row_than_allowed_end_the_run_also_over_a_resume(allowed: int):
    engine, skips = plain_engine(), SkippedUpdates(allowed, 0, "runs/x")

    def after(number: int, kind: str | None) -> StepDone:
        if kind:
            fault(kind, engine)
        done = take_step(engine, CONFIG, number - 1)
        mend(engine)
        skips.after_step(done)
        skips.settle(done)
        return done

    for number in range(1, allowed + 1):
        assert not after(number, "gradient").ends_training
    assert not after(allowed + 1, None).ends_training
    for number in range(allowed + 2, 2 * allowed + 2):
        assert not after(number, "gradient").ends_training
    assert skips.in_a_row == allowed
    skips = SkippedUpdates(allowed, skips.in_a_row, "runs/x")  # as read from a checkpoint
    done = after(2 * allowed + 2, "gradient")
    assert done.ends_training
    assert done.must_save
    line = str(done.error)
    assert line.startswith(
        f"agent 1: loss or gradient is not finite at step {2 * allowed + 2} (gradient norm "
    )
    assert f"'max_skipped_steps' allows {allowed} " in line
    assert f"runs/x/checkpoints/step_{2 * allowed + 2:06d} holds" in line


def test_fp16s_overflow_skips_all_agents_shrinks_the_scale_and_is_not_counted_until_the_scale_is_1():
    """With torch's own scaler, given to Accelerate, which makes one on a GPU only."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    engine = start_engine(accelerator, toy_agents("fused"), CONFIG)
    accelerator.native_amp, accelerator.state._mixed_precision = (
        True,
        "fp16",
    )  # now, or it would cast the forward
    skips = SkippedUpdates(10, 0, "runs/x")
    skips.after_step(take_step(engine, CONFIG, 0))
    before = clone(read_state(engine))
    fault("gradient", engine)
    for step, scale, counted in ((2, 2.0, 0), (3, 1.0, 1), (4, 0.5, 2)):
        done = take_step(engine, CONFIG, step)
        assert engine.loss_scale() == scale
        skips.after_step(done)
        skips.settle(done)
        assert skips.in_a_row == counted
        assert all(are_equal(read_state(engine), before, agent) for agent in range(3))
