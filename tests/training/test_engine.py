"""Precision, launchers, clipping, partitions, the end. test_agents.py and test_train.py compare gradients."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accumulation_worker import MAX_GRAD_NORM, MICRO_BATCHES, step_over
from launching import ddp, zero2
from preloaded import forked
from torch.nn.parallel import DistributedDataParallel
from toy import gradients_of, max_difference, toy_agents, toy_batch

from chorus.config import Config
from chorus.errors import InputError
from chorus.training.engine import decide_precision, make_accelerator, start_engine
from chorus.training.schedule import learning_rate


def test_auto_precision_is_fp32_without_a_gpu_and_fp16_is_refused_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decide_precision("auto") == "no"
    assert decide_precision("bf16") == "bf16"
    with pytest.raises(InputError, match="fp16"):
        decide_precision("fp16")


def test_accumulation_is_that_of_configs_yaml_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    config = Config(gradient_accumulation_steps=3)
    assert make_accelerator(config, config).gradient_accumulation_steps == 3


def one_large_micro_batch() -> tuple[dict[str, torch.Tensor], float]:
    return step_over(
        start_engine(Accelerator(cpu=True), toy_agents("fused"), Config(max_grad_norm=MAX_GRAD_NORM)), 1
    )


def assert_same_step(
    ours: tuple[dict[str, torch.Tensor], float], theirs: tuple[dict[str, torch.Tensor], float]
) -> None:
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in theirs[0].items():
        assert max_difference(ours[0][name], tensor) < 1e-5, name
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)


def test_several_micro_batches_and_one_step_are_one_large_micro_batch():
    expected = one_large_micro_batch()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
    engine = start_engine(accelerator, toy_agents("fused"), Config(max_grad_norm=MAX_GRAD_NORM))
    assert_same_step(step_over(engine, MICRO_BATCHES), expected)


@pytest.mark.launch
@pytest.mark.parametrize("command", [ddp(2), zero2(2)], ids=["ddp", "zero2"])
def test_micro_batches_of_two_processes_and_one_step_are_one_large_micro_batch(
    command: list[str], tmp_path: Path
):
    result = forked([*command[:-1], "tests/helpers/accumulation_worker.py"], str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_step(torch.load(tmp_path / "step.pt", weights_only=True), one_large_micro_batch())


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.25])
def test_clipping_is_one_norm_over_all_agents_and_zero_is_off(max_grad_norm: float):
    """One SGD-like step cannot be read off AdamW, so the
    gradient is read where the optimizer would use it."""
    agents = toy_agents("parallel")
    engine = start_engine(Accelerator(cpu=True), agents, Config(max_grad_norm=max_grad_norm))
    seen: list[torch.Tensor] = []
    engine.optimizer.optimizer.register_step_pre_hook(  # pyright: ignore
        lambda *_: seen.__setitem__(  # it may be called for each agent
            slice(None),
            [gradient.clone() for gradient in gradients_of(agents).values()],  # pyright: ignore
        )
    )
    with engine.micro_batch(is_last=True):
        engine.backward(engine.module(toy_batch(), step=0).nll_KBT.sum())
    result = engine.step(0.01)
    norm = torch.stack([gradient.norm() for gradient in seen]).norm().item()
    assert norm == pytest.approx(max_grad_norm or float(result.grad_norm), rel=1e-4)
    assert float(result.grad_norm) > 1
    assert (result.lr, engine.optimizer.param_groups[0]["lr"]) == (0.01, 0.01)


def test_only_adapters_are_optimised_an_agent_a_group_with_torchs_adamw_defaults():
    agents = toy_agents("sequential")
    engine = start_engine(Accelerator(cpu=True), agents, Config(lr=0.5, weight_decay=0.25))
    stock = torch.optim.AdamW([torch.zeros(1)], lr=0.5, weight_decay=0.25, fused=True)
    for agent, group in enumerate(engine.optimizer.param_groups):
        assert list(map(id, group["params"])) == [id(agents.adapters()[agent])]
        assert {key: group[key] for key in stock.defaults} == stock.defaults
    assert len(engine.optimizer.param_groups) == 3


def test_every_agents_rate_and_weight_decay_are_those_of_a_torch_adamw_of_its_own():
    """Over several steps, so that moments, bias correction, decay and a schedule's rates meet."""
    lr, weight_decay = [0.1, 0.01, 0.05], [0.0, 0.5, 0.1]
    agents = toy_agents("fused")
    config = Config(num_agents=3, lr=lr, weight_decay=weight_decay, max_grad_norm=0.0)
    lone = [torch.nn.Parameter(own.detach().clone()) for own in agents.adapters().values()]
    stock = [torch.optim.AdamW([own], lr=lr[k], weight_decay=weight_decay[k]) for k, own in enumerate(lone)]
    lr_at = learning_rate("linear", config.lr, num_steps=4, warmup_ratio=0.25)
    engine = start_engine(Accelerator(cpu=True), agents, config)
    for step in range(4):
        with engine.micro_batch(is_last=True):
            engine.backward(engine.module(toy_batch(seed=step), step=step).nll_KBT.sum())
        for k, adapter_F in agents.adapters().items():
            lone[k].grad = adapter_F.grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
            stock[k].param_groups[0]["lr"] = learning_rate("linear", lr[k], 4, 0.25)(step)
            stock[k].step()
        assert engine.step(lr_at(step)).lr == pytest.approx([one.param_groups[0]["lr"] for one in stock])
        for own, theirs in zip(agents.adapters().values(), lone, strict=True):
            assert max_difference(own, theirs) < 1e-6


def test_ddp_does_not_outlive_the_process_group():
    """DDP that is freed later destroys the group under Python's
    lock: one exit in some tens then hangs for good."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    engine = start_engine(Accelerator(cpu=True), toy_agents("fused"), Config())
    wrapped = DistributedDataParallel(engine.agents)
    engine.accelerator._models[:] = [wrapped]  # as Accelerate keeps it
    engine = replace(engine, module=wrapped)
    wrapped(toy_batch(), step=0).nll_KBT.sum().backward()
    wrapped = weakref.ref(wrapped)
    engine.close()
    assert wrapped() is None
    assert not torch.distributed.is_initialized()


@pytest.mark.launch
def test_two_zero2_processes_hold_half_of_the_gradients_and_of_the_optimizer_state_each(tmp_path: Path):
    result = forked([*zero2(2)[:-1], "tests/helpers/engine_worker.py"], str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        half = facts["trainable"] / 2
        assert (facts["stage"], facts["world"], facts["clipping"]) == (2, 2, 0.0)  # stepping.py clips
        # A partition is padded to the world's alignment, by a few elements.
        assert half <= facts["gradients"] <= half + 64
        assert all(half <= numel <= half + 64 for numel in facts["optimizer_state"])
