"""The state of a run under one identity, whatever mode and engine holds it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from launching import zero2
from preloaded import forked
from toy import toy_agents, toy_batch

from chorus.checkpoint.store import Checkpointer, read_tensors, verify
from chorus.config import Config
from chorus.errors import InputError
from chorus.training.engine import Engine, start_engine
from chorus.training.state import MOMENTS, TrainingState, read_state, restore_state

CONFIG = Config(lambda_sw=0.0, num_agents=3)


@pytest.fixture(autouse=True)
def _plain() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def plain_engine(mode, trained: bool = True) -> Engine:
    return start_engine(Accelerator(cpu=True), toy_agents(mode, trained=trained), CONFIG)


def step(engine: Engine, seed: int) -> None:
    with engine.micro_batch(is_last=True):
        engine.backward(engine.module(toy_batch(seed=seed), step=seed).nll_KBT.mean())
    engine.step(CONFIG.lr)


def assert_equal(one: TrainingState, other: TrainingState) -> None:
    assert one.optimizer_step == other.optimizer_step
    for ours, theirs in [
        (one.weights, other.weights),
        *((one.moments[m], other.moments[m]) for m in MOMENTS),
    ]:
        assert ours.keys() == theirs.keys()
        for identity, tensor in ours.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, theirs[identity]), identity


@pytest.mark.parametrize("saved_in", ["fused", "sequential", "parallel"])
@pytest.mark.parametrize("resumed_in", ["fused", "sequential", "parallel"])
def test_a_state_taken_up_in_any_mode_is_equal_and_goes_on_alike(saved_in, resumed_in):
    saved = plain_engine(saved_in)
    for seed in range(3):
        step(saved, seed)
    state = read_state(saved)
    state = TrainingState(
        {identity: tensor.clone() for identity, tensor in state.weights.items()},
        {m: {identity: tensor.clone() for identity, tensor in state.moments[m].items()} for m in MOMENTS},
        state.optimizer_step,
    )
    assert state.optimizer_step == 3
    resumed = plain_engine(resumed_in, trained=False)
    restore_state(resumed, state)
    assert_equal(read_state(resumed), state)
    step(saved, 3)
    step(resumed, 3)
    one, other = read_state(saved), read_state(resumed)
    if saved_in == resumed_in:
        assert_equal(one, other)
    for identity, tensor in one.weights.items():
        assert torch.allclose(tensor, other.weights[identity], rtol=0, atol=1e-6)


def test_a_state_of_other_shapes_is_refused_and_the_tensor_named():
    engine = plain_engine("parallel")
    step(engine, 0)
    state = read_state(engine)
    identity = next(iter(state.weights))
    for weights in (
        {**state.weights, identity: torch.zeros(1, 1)},
        {key: tensor for key, tensor in state.weights.items() if key != identity},
        {**state.weights, identity._replace(agent=3): torch.zeros(1, 1)},
    ):
        before = engine.adapter_values()
        with pytest.raises(InputError, match=rf"agent \d, {identity.path} \(A\) has shape"):
            restore_state(engine, state._replace(weights=weights))
        assert all(torch.equal(before[key], tensor) for key, tensor in engine.adapter_values().items())


@pytest.mark.launch
def test_plain_to_two_zero2_processes_and_back_is_bitwise_at_load(tmp_path: Path):
    engine = plain_engine("parallel")
    for seed in range(3):
        step(engine, seed)
    Checkpointer(tmp_path, CONFIG, {}).save(engine, step=3, epoch=0, skips_in_a_row=0)
    result = forked([*zero2(2)[:-1], "tests/helpers/state_worker.py"], str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    plain, loaded, stepped = (
        read_tensors(folder, verify(folder).optimizer_step)
        for folder in (tmp_path / "checkpoints" / f"step_{number:06d}" for number in (3, 4, 5))
    )
    assert_equal(plain, loaded)
    assert stepped.optimizer_step == 4
    assert not torch.equal(next(iter(stepped.weights.values())), next(iter(plain.weights.values())))
    back = plain_engine("sequential", trained=False)
    restore_state(back, stepped)
    assert_equal(read_state(back), stepped)
