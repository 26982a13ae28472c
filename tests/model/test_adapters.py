"""Adapters as PEFT makes them, and the random draws of a pass."""

from itertools import combinations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toy import ALPHA, RANK, TARGETS, max_difference, tiny_gemma, toy_agents, toy_batch, toy_shape

from chorus.errors import InputError
from chorus.model.adapters import AdapterContext, AdapterRouter, attach_agents, lora_layers
from chorus.model.agents import Mode, Regularisation, build_agents, causal_lm
from chorus.model.regularisation import Noise, draw_keep_masks
from chorus.seeding import derive_seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_adapters_are_pefts_own_and_differ_between_agents(dtype: torch.dtype):
    """PEFT alone, seeded as that agent is, gives the same A, in fp32 on any base; every B is zero."""
    agents = toy_agents("sequential", trained=False, dtype=dtype).adapter_tensors()
    for agent in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(0, "initial adapter", agent))
            config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
            stock = dict(get_peft_model(tiny_gemma(dtype=dtype), config).named_parameters())
        for identity, tensor in agents.items():
            if identity.agent == agent:
                assert torch.equal(tensor, stock[f"{identity.path}.lora_{identity.matrix}.default.weight"])
                assert tensor.dtype == torch.float32
                assert bool(tensor.any()) == (identity.matrix == "A")
                if identity.matrix == "A":
                    assert not torch.equal(tensor, agents[identity._replace(agent=(agent + 1) % 3)])


def test_initial_adapters_do_not_depend_on_the_mode():
    sequential = toy_agents("sequential", trained=False).adapter_tensors()
    parallel = toy_agents("parallel", trained=False).adapter_tensors()
    assert sequential.keys() == parallel.keys()
    assert all(torch.equal(tensor, parallel[identity]) for identity, tensor in sequential.items())


def test_random_initial_adapters_are_normal_with_standard_deviation_002_in_a_and_b():
    agents = build_agents("fused", tiny_gemma(), 2, toy_shape(random_init=True), Regularisation(0, 0, 0))
    for matrix in "AB":
        own = [
            tensor.flatten()
            for identity, tensor in agents.adapter_tensors().items()
            if identity.matrix == matrix
        ]
        drawn = torch.cat(own)
        assert drawn.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(drawn.mean().item()) < 0.001
        assert len(drawn.unique()) > 0.99 * len(drawn)


@pytest.mark.parametrize("mode", ["fused", "parallel"])
@pytest.mark.parametrize("random_init", [False, True], ids=["", "random"])
def test_a_gain_is_a_factor_on_the_initial_a_of_its_agent_and_on_nothing_else(mode: Mode, random_init: bool):
    gains, rates = [1.0, 10.0, 0.3], Regularisation(0, 0, 0)
    with_gains, plain = (
        build_agents(mode, tiny_gemma(), 3, toy_shape(random_init, init_gain=gain), rates).adapter_tensors()
        for gain in (gains, 1.0)
    )
    for identity, tensor in plain.items():
        factor = gains[identity.agent] if identity.matrix == "A" else 1.0
        assert torch.equal(with_gains[identity], tensor * factor), identity


def test_attaching_agents_moves_no_global_generator():
    state = torch.random.get_rng_state()
    toy_agents("parallel")
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q_projj",), "has no such layer"),
        (("embed_tokens",), "Embedding"),
        (("self_attn",), "Gemma2Attention"),
    ],
)
def test_a_target_that_cannot_carry_an_adapter_is_named_with_those_that_can(
    targets: tuple[str, ...], words: str
):
    shape = toy_shape()
    wrong = type(shape)(shape.rank, shape.alpha, targets, False, 0)
    with pytest.raises(InputError, match=words) as refused:
        attach_agents(tiny_gemma(), [0], wrong, AdapterRouter())
    assert "down_proj, gate_proj" in str(refused.value)


def test_all_linear_is_every_linear_layer_but_the_head():
    shape = toy_shape()
    model = attach_agents(
        tiny_gemma(), [0], type(shape)(RANK, ALPHA, "all-linear", False, 0), AdapterRouter()
    )
    assert len(lora_layers(model)) == 2 * len(TARGETS)
    assert not any("lm_head" in path for path in lora_layers(model))


def test_keep_masks_drop_a_share_p_independently_for_each_agent_and_step():
    adapters = {agent: torch.zeros(8400) for agent in (0, 1)}
    masks, later = (
        draw_keep_masks(adapters, 0.3, seed=1, step=2),
        draw_keep_masks(adapters, 0.3, seed=1, step=3),
    )
    drawn = [*masks.values(), *later.values()]
    for keep_F, other_F in combinations(drawn, 2):  # independent: they agree as often as chance has it
        assert (keep_F == other_F).float().mean().item() == pytest.approx(0.7**2 + 0.3**2, abs=0.04)
    for keep_F in drawn:
        assert keep_F.shape == (8400,)
        assert keep_F.float().mean().item() == pytest.approx(0.7, abs=0.03)
        one, other = keep_F.view(2, -1)  # nor do two matrices of an agent share a draw
        assert (one == other).float().mean().item() == pytest.approx(0.7**2 + 0.3**2, abs=0.04)
    again = draw_keep_masks(adapters, 0.3, seed=1, step=2)
    assert all(torch.equal(keep_F, again[agent]) for agent, keep_F in masks.items())


def test_an_agents_masks_do_not_depend_on_which_other_agents_are_held():
    adapters = {agent: torch.zeros(81) for agent in (0, 1, 2)}
    (mask_F,) = draw_keep_masks({1: adapters[1]}, 0.5, 0, 0).values()
    assert torch.equal(mask_F, draw_keep_masks(adapters, 0.5, 0, 0)[1])


def test_dropout_draws_differ_between_slots_steps_agents_and_layers_and_keep_the_mean():
    x = torch.ones(50, 200)

    def draw(step: int = 0, slot: int = 0, agent: int = 0, path: str = "x"):
        return Noise(0, step, slot, {}, 0.0, 0.25).drop(x, agent, path)

    first = draw()
    assert torch.equal(first, draw())
    assert first.mean().item() == pytest.approx(1, abs=0.02)
    assert set(first.unique().tolist()) == {0.0, 1 / 0.75} or len(first.unique()) == 2
    for other in (draw(step=1), draw(slot=1), draw(agent=1), draw(path="y")):
        assert not torch.equal(first, other)


def test_a_turn_ends_also_when_its_pass_fails():
    router = AdapterRouter()
    with pytest.raises(ZeroDivisionError), router.of(AdapterContext((2,), 0, {})):
        _ = 1 / 0
    assert router.context.agents == ()


def test_the_base_alone_is_the_base():
    agents, batch = toy_agents("parallel"), toy_batch()
    with agents.trunk(None) as trunk:
        hidden_BTD = trunk(input_ids=batch.input_BT).last_hidden_state
    expected = tiny_gemma()(input_ids=batch.input_BT, output_hidden_states=True).hidden_states[-1]
    assert max_difference(hidden_BTD, expected) < 1e-6
    assert causal_lm(agents.peft_model(0)).config.vocab_size == 61
