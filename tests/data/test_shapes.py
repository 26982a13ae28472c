"""Batches are padded to few shapes, which costs the least and changes no loss and no gradient."""

import logging
from itertools import combinations, islice

import numpy as np
import pytest
from promises import EXACT, settings_of_rows
from toy import gradients_of, max_difference, toy_agents, toy_samples

from chorus.data.batches import Batch, StepBatch, training_steps
from chorus.data.packing import Layout
from chorus.data.shapes import MAX_SHAPES, PASSES_A_SHAPE, few_shapes, few_sizes, layouts_of_epochs
from chorus.mesh import ALONE
from chorus.model.kernels.cuda_graphs import MAX_CAPTURES
from chorus.training.objective import objective_of

SAMPLES = toy_samples(13)  # the last batch of an epoch is smaller
NUM_STEPS = 4  # two epochs


def cost(sizes: list[int], chosen: tuple[int, ...], num_passes: int) -> float:
    rounded = sum(min(size for size in chosen if size >= own) for own in sizes)
    return rounded + len(chosen) * PASSES_A_SHAPE / num_passes * sum(sizes)


@pytest.mark.parametrize("num_passes", [1, 60, 300, 2_000, 100_000])
def test_the_sizes_cost_least_among_all_choices(num_passes: int):
    generator = np.random.default_rng(num_passes)
    for _ in range(20):
        sizes = generator.integers(1, 9, size=30).tolist()
        distinct = sorted(set(sizes))
        choices = [(*some, distinct[-1]) for n in range(8) for some in combinations(distinct[:-1], n)]
        least = min(cost(sizes, choice, num_passes) for choice in choices)
        assert cost(sizes, few_sizes(sizes, num_passes), num_passes) == pytest.approx(least)


def test_a_short_run_has_one_size_and_the_longest_no_more_than_can_be_captured():
    sizes = list(range(1, 41)) * 5
    assert few_sizes(sizes, 10) == (40,)
    assert len(few_sizes(sizes, 10**9)) == MAX_SHAPES <= MAX_CAPTURES


def test_what_is_larger_than_all_that_was_looked_at_keeps_its_size():
    layouts = [Layout(4, 64, []), Layout(3, 32, [])]
    assert few_shapes(layouts, False, 1)[0].padded(Layout(5, 96, [])) == (5, 96, [])
    assert few_shapes(layouts, False, 1)[0].padded(Layout(1, 8, [])) == (4, 64, [])
    assert few_shapes(layouts, True, 1)[0].padded(Layout(1, 64, [])) == (4, 64, [])


def test_layouts_go_through_every_batch_of_every_epoch():
    orders = np.array([0, 1, 2]), np.array([2, 0, 1])
    found = layouts_of_epochs(np.array([5, 3, 9]), [[order] for order in orders], 2, 1, None)
    assert [(one.B, one.T) for one in islice(found, 9)] == [(2, 4), (1, 8), (2, 8), (1, 2)]
    of_agents = layouts_of_epochs(np.array([5, 3, 9]), [orders], 2, 1, None)
    assert [(one.B, one.T) for one in of_agents] == [(2, 8), (1, 8)]


VARIANTS = {
    "tokens": {"lambda_sw": 0.5},
    "mean": {"lambda_sw": 0.5, "swd_representation": "mean"},
    "last": {"lambda_sw": 0.5, "swd_representation": "last"},
    "responsibilities": {"responsibility_alpha": 0.5},
    "poisson": {"bootstrap": "poisson"},
    "rows of their own": {"per_agent_batches": True},
    "weighted rows of their own": {"per_agent_batches": True, "bootstrap": "bayesian"},
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_few_shapes_change_no_loss_and_no_gradient(
    variant: str, packing: bool, caplog: pytest.LogCaptureFixture
):
    keys = {"bootstrap": "none", "per_agent_batches": False, "packing": packing, **VARIANTS[variant]}
    config, agents = settings_of_rows(**keys), toy_agents("fused")
    loss_fn = objective_of(config, config, ALONE)

    def steps(wants_few_shapes: bool) -> list[StepBatch]:
        where = {"points_per_row": 2, "pad_id": 0, "process_index": 0, "num_processes": 1}
        how = {**where, "num_steps": NUM_STEPS, "wants_few_shapes": wants_few_shapes}
        return list(training_steps(SAMPLES, config, config, agents=agents.agents, **how))

    def learnt(batch: Batch, step: StepBatch) -> tuple[list, dict]:
        agents.zero_grad()
        part = loss_fn(*agents(batch, step=0, slot=0), batch, num_targets=step.num_targets, step=0)
        part.share.backward()
        return [part.share.detach(), part.nll_K], gradients_of(agents)

    with caplog.at_level(logging.INFO):
        padded = steps(True)
    shapes = {batch.input_BT.shape for step in padded for batch in step.micro_batches}
    assert f"shapes of batches: {len(shapes)}; " in caplog.text
    assert len(shapes) == 1
    for step, few in zip(steps(False), padded, strict=True):
        assert step[1:] == few[1:]
        for batch, larger in zip(step.micro_batches, few.micro_batches, strict=True):
            losses, gradients = learnt(batch, step)
            found_losses, found = learnt(larger, few)
            for expected, own in zip(losses, found_losses, strict=True):
                assert max_difference(own, expected) < 1e-6
            for identity, gradient in gradients.items():
                assert max_difference(found[identity], gradient) < EXACT, identity
