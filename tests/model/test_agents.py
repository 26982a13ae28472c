"""The five promises of every mode. A new mode joins by its name in `chorus.model.agents.Mode`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from launching import ddp
from preloaded import forked
from promises import (
    EVERY_MODE,
    EXACT,
    MODES,
    assert_a_forward_leaves_no_trace,
    assert_every_agent_gets_the_gradient_of_a_lone_run,
    assert_every_agent_learns_its_rows_with_their_weights,
    settings_of_rows,
)
from sampling import sampled
from torch import Tensor
from toy import (
    ALPHA,
    RANK,
    TARGETS,
    ZERO2_CASES,
    coupled_objective,
    gradients_of,
    max_difference,
    run,
    small_gpt_neox,
    small_llama,
    toy_agents,
    toy_batch,
    toy_samples,
)

from chorus.data.batches import collate
from chorus.errors import InputError
from chorus.model.adapters import LoraShape, lora_layers
from chorus.model.agents import Agents, Mode, Regularisation, build_agents, causal_lm
from chorus.model.base import trunk_of
from chorus.model.execution import Execution
from chorus.model.kernels.decoder_layers import Recompute

RECOMPUTE = get_args(Recompute)
CHECKPOINTING = pytest.mark.parametrize("checkpointing", RECOMPUTE)


# ---- 1: agents in order, shapes, dtypes ----


@EVERY_MODE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_has_the_stated_shapes_and_dtypes_and_zeros_where_no_loss_is_due(
    mode: Mode, dtype: torch.dtype
):
    batch = toy_batch()
    B, T = batch.input_BT.shape
    nll_KBT, hidden_KBTD = toy_agents(mode, num_agents=3, dtype=dtype)(batch)
    assert (nll_KBT.shape, nll_KBT.dtype) == ((3, B, T), torch.float32)
    assert (hidden_KBTD.shape, hidden_KBTD.dtype) == ((3, B, T, 32), dtype)
    assert bool((nll_KBT[:, ~batch.mask_BT] == 0).all())
    assert bool((nll_KBT[:, batch.mask_BT] > 0).all())


@EVERY_MODE
def test_the_agents_come_in_order(mode: Mode):
    batch, agents = toy_batch(), toy_agents(mode)
    nll_KBT = agents(batch).nll_KBT
    with torch.no_grad():
        for agent in agents.agents:
            assert torch.equal(nll_KBT[agent], agents.agent_pass(agent, batch)[0])


# ---- 2: gradients reach every agent and nothing else ----


@EVERY_MODE
@CHECKPOINTING
def test_gradients_reach_the_adapters_of_every_agent_and_nothing_else(mode: Mode, checkpointing: Recompute):
    agents = toy_agents(mode, gradient_checkpointing=checkpointing)
    _, gradients = run(agents, toy_batch())
    assert len(gradients) == 3 * 2 * len(TARGETS) * 2
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients.values())
    adapters = set(map(id, agents.adapters().values()))
    others = [parameter for parameter in agents.parameters() if id(parameter) not in adapters]
    assert others
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in others)


# ---- 3 and 4: every mode is exact, also under checkpointing, DropConnect and dropout ----


@EVERY_MODE
@CHECKPOINTING
def test_every_agent_gets_the_gradient_of_a_lone_run(mode: Mode, checkpointing: Recompute):
    assert_every_agent_gets_the_gradient_of_a_lone_run(toy_agents(mode, gradient_checkpointing=checkpointing))


@pytest.mark.parametrize(
    ("mode", "checkpointing", "base"), sampled(MODES, RECOMPUTE, [small_llama, small_gpt_neox])
)
def test_other_architectures_get_the_gradient_of_a_lone_run_too(
    mode: Mode, checkpointing: Recompute, base: Callable
):
    shape = LoraShape(RANK, ALPHA, "all-linear", random_init=True, seed=0)
    execution = Execution(recompute=checkpointing)
    agents = build_agents(mode, base(), 2, shape, Regularisation(0, 0, 0), execution)
    assert_every_agent_gets_the_gradient_of_a_lone_run(agents, base, "all-linear")


@pytest.mark.parametrize(
    ("passes", "checkpointing", "rows"),
    sampled(
        [*((mode, None) for mode in MODES), ("fused", 2)],
        RECOMPUTE,
        [
            ("poisson", False, False),
            ("bayesian", False, True),
            ("none", True, False),
            ("poisson", True, True),
        ],
    ),
)
def test_every_agent_learns_its_own_rows_with_its_own_weights(
    passes: tuple[Mode, int | None], checkpointing: Recompute, rows: tuple[str, bool, bool]
):
    """passes: mode and agents_per_pass. rows: bootstrap, per_agent_batches, packing."""
    (mode, agents_per_pass), (bootstrap, per_agent_batches, packing) = passes, rows
    how = {"gradient_checkpointing": checkpointing, "agents_per_pass": agents_per_pass}
    config = settings_of_rows(bootstrap, per_agent_batches, packing=packing)
    assert_every_agent_learns_its_rows_with_their_weights(toy_agents(mode, **how), config)


@pytest.mark.parametrize(
    ("mode", "checkpointing", "dropconnect_p", "dropout_p"),
    sampled(MODES, RECOMPUTE, [0.0, 0.4], [0.0, 0.3]),
)
def test_every_mode_gives_the_same_values_and_gradients(
    mode: Mode, checkpointing: Recompute, dropconnect_p: float, dropout_p: float
):
    noise = {"dropconnect_p": dropconnect_p, "dropout_p": dropout_p}
    batch = toy_batch()
    expected, expected_gradients = run(toy_agents("parallel", **noise), batch)
    output, gradients = run(toy_agents(mode, gradient_checkpointing=checkpointing, **noise), batch)
    assert max_difference(output.nll_KBT, expected.nll_KBT) < EXACT
    assert max_difference(output.hidden_KBTD, expected.hidden_KBTD) < EXACT
    for identity, gradient in expected_gradients.items():
        assert max_difference(gradients[identity], gradient) < EXACT, identity


@EVERY_MODE
@CHECKPOINTING
def test_every_mode_agrees_in_bf16_to_two_percent(mode: Mode, checkpointing: Recompute):
    batch = toy_batch()
    expected, expected_gradients = run(toy_agents("parallel", dtype=torch.bfloat16), batch)
    output, gradients = run(
        toy_agents(mode, dtype=torch.bfloat16, gradient_checkpointing=checkpointing), batch
    )
    assert max_difference(output.nll_KBT, expected.nll_KBT) < 0.02
    for identity, gradient in expected_gradients.items():
        assert max_difference(gradients[identity], gradient) < 0.02, identity


@pytest.mark.parametrize(
    ("agents_per_pass", "checkpointing", "dropconnect_p"), sampled([1, 2], RECOMPUTE, [0.0, 0.4])
)
def test_groups_of_fused_agents_give_what_all_of_them_give(
    agents_per_pass: int, checkpointing: Recompute, dropconnect_p: float
):
    noise = {"dropconnect_p": dropconnect_p, "dropout_p": 0.3, "gradient_checkpointing": checkpointing}
    batch = toy_batch()
    expected, expected_gradients = run(toy_agents("fused", **noise), batch)
    output, gradients = run(toy_agents("fused", agents_per_pass=agents_per_pass, **noise), batch)
    assert max_difference(output.nll_KBT, expected.nll_KBT) < EXACT
    for identity, gradient in expected_gradients.items():
        assert max_difference(gradients[identity], gradient) < EXACT, identity


@pytest.mark.parametrize(("checkpointing", "expected"), [("none", 4), ("selective", 4), ("full", 2)])
def test_groups_are_passed_again_in_backward_where_their_layers_are_not(
    checkpointing: Recompute, expected: int
):
    agents, passes = toy_agents("fused", agents_per_pass=2, gradient_checkpointing=checkpointing), []
    trunk_of(causal_lm(agents.peft_models[0])).register_forward_hook(lambda *_: passes.append(1))  # pyright: ignore
    run(agents, toy_batch())
    assert len(passes) == expected


@EVERY_MODE
def test_dropconnect_is_a_masked_and_rescaled_copy_of_the_weights(mode: Mode):
    """Closed form: the same agents with their weights multiplied by mask / (1 - p), and no DropConnect."""
    batch = toy_batch()
    noisy, plain = toy_agents(mode, dropconnect_p=0.4), toy_agents(mode)
    output, gradients = run(noisy, batch)
    assert noisy._noise is not None
    masks = {identity: keep / 0.6 for identity, keep in noisy.named(noisy._noise.keep).items()}
    for identity, tensor in plain.adapter_tensors().items():
        tensor.data *= masks[identity]
    expected, expected_gradients = run(plain, batch)
    assert max_difference(output.nll_KBT, expected.nll_KBT) < EXACT
    for identity, gradient in gradients.items():
        assert max_difference(gradient, expected_gradients[identity] * masks[identity]) < EXACT


@EVERY_MODE
def test_random_draws_differ_between_steps_and_agents_and_are_off_in_evaluation(mode: Mode):
    batch = toy_batch()
    agents = toy_agents(mode, dropconnect_p=0.4, dropout_p=0.2)
    one, again, other = (agents(batch, step=step).nll_KBT for step in (1, 1, 2))
    assert torch.equal(one, again)
    assert max_difference(one, other) > 1e-3
    assert torch.equal(agents(batch).nll_KBT, toy_agents(mode)(batch).nll_KBT)


@EVERY_MODE
@CHECKPOINTING
def test_two_micro_batches_before_one_backward_are_recomputed_with_their_own_draws(
    mode: Mode, checkpointing: Recompute
):
    """A recomputation that read the latest draw instead of its own would mix the two."""
    batches = [toy_batch(seed=1), toy_batch(seed=2)]

    def gradients(agents: Agents, together: bool) -> list[Tensor]:
        losses = (
            coupled_objective(agents(batch, step=slot, slot=slot), batch)
            for slot, batch in enumerate(batches)
        )
        for loss in [sum(losses)] if together else losses:
            loss.backward()  # pyright: ignore[reportAttributeAccessIssue]
        return list(gradients_of(agents).values())

    noisy = partial(toy_agents, mode, gradient_checkpointing=checkpointing, dropconnect_p=0.4, dropout_p=0.3)
    for one, other in zip(gradients(noisy(), True), gradients(noisy(), False), strict=True):
        assert max_difference(one, other) < EXACT


def test_fused_agents_refuse_a_layer_that_is_given_other_rows_than_the_batchs():
    """Experts are given the tokens sent to them: their rows do not tell whose they are."""
    agents = toy_agents("fused")
    layer = next(iter(lora_layers(agents.peft_model(0)).values()))
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[:-1],))
    with pytest.raises(InputError, match="q_proj is given other rows than the batch's"):
        agents(toy_batch())


# ---- 5: no trace ----


@pytest.mark.parametrize(("mode", "checkpointing", "dropconnect_p"), sampled(MODES, RECOMPUTE, [0.0, 0.4]))
def test_a_forward_leaves_no_trace(mode: Mode, checkpointing: Recompute, dropconnect_p: float):
    noise = {"dropconnect_p": dropconnect_p, "dropout_p": 0.3}
    assert_a_forward_leaves_no_trace(toy_agents(mode, gradient_checkpointing=checkpointing, **noise))


# ---- storage ----


@EVERY_MODE
def test_the_base_is_held_once_and_no_two_agents_share_an_adapter(mode: Mode):
    one, four = toy_agents(mode, num_agents=1), toy_agents(mode, num_agents=4)
    tensors = four.adapter_tensors().values()
    places = [tensor.data_ptr() + offset for tensor in tensors for offset in range(0, tensor.nbytes, 4)]
    assert len(set(places)) == len(places)
    assert len({adapter_F.untyped_storage().data_ptr() for adapter_F in four.adapters().values()}) == 4

    def frozen_storages(agents: Agents) -> set[int]:
        own = {adapter_F.data_ptr() for adapter_F in agents.adapters().values()}
        return {tensor.data_ptr() for tensor in [*agents.parameters(), *agents.buffers()]} - own

    assert len(frozen_storages(four)) == len(frozen_storages(one))


def test_sequential_mode_holds_the_activations_of_one_agent_at_a_time():
    """Peak bytes kept for backward, forward and backward included; only outputs may grow with K."""

    class Kept:
        live = peak = 0

        def __init__(self, tensor: Tensor):
            self.tensor = tensor
            Kept.live += tensor.nbytes
            Kept.peak = max(Kept.peak, Kept.live)

        def __del__(self):
            Kept.live -= self.tensor.nbytes

    def peak(mode: Mode, num_agents: int) -> int:
        Kept.live = Kept.peak = 0
        agents, batch = toy_agents(mode, num_agents=num_agents), toy_batch(rows=8, length=24)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            run(agents, batch, lambda_sw=0)
        return Kept.peak

    assert peak("sequential", 6) < 1.5 * peak("sequential", 1)
    assert peak("parallel", 6) > 4 * peak("parallel", 1)


# ---- all of it under DeepSpeed ZeRO-2, in two real processes ----


@pytest.mark.launch
@pytest.mark.parametrize("which", ["sample", pytest.param("all", marks=pytest.mark.slow)])
def test_two_zero2_processes_get_the_gradients_of_one_plain_process(which: str, tmp_path: Path):
    """Each process holds half of the samples; gradients are read from the engine (deepspeed_worker.py)."""
    result = forked([*ddp(2)[:-1], "tests/helpers/deepspeed_worker.py"], str(tmp_path), which)
    assert result.returncode == 0, result.stderr[-3000:]
    batch = collate(toy_samples(8), 0, points_per_row=3)
    for mode, checkpointing, dropconnect_p, packing in ZERO2_CASES[which]:
        plain = toy_agents(mode, gradient_checkpointing=checkpointing, dropconnect_p=dropconnect_p)
        _, expected = run(plain, batch)
        found = torch.load(
            tmp_path / f"{mode}-{checkpointing}-{dropconnect_p}-{packing}.pt", weights_only=True
        )
        assert len(found) == len(expected)
        for identity, gradient in expected.items():
            assert max_difference(found[json.dumps(identity)], gradient) < EXACT, (
                mode,
                checkpointing,
                packing,
                identity,
            )
