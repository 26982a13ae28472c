"""Packed batches: where samples lie, and that nothing but the layout differs from one sample a row."""

import random
from functools import partial
from typing import get_args

import pytest
import torch
from promises import EVERY_MODE, EXACT, run
from torch import Tensor
from torch.nn.attention import flex_attention
from toy import max_difference, toy_agents, toy_samples
from transformers.integrations.flex_attention import WrappedFlexAttention

from chorus.config import Config
from chorus.data.batches import Batch, StepBatch, collate, training_steps
from chorus.data.packing import packed
from chorus.model import attention
from chorus.model.agents import Agents, Mode
from chorus.model.kernels.decoder_layers import Recompute
from chorus.training.diversity import cloud

SAMPLES = toy_samples()
LONGEST = 20  # rows of 19 tokens, which hold two or three samples
PACKING = LONGEST


# ---- where samples lie ----


def test_samples_lie_whole_and_apart():
    draw = random.Random(0)
    for batch_size in (1, 3, 8, 9, 40):
        for _ in range(200):
            lengths = [draw.randint(1, 30) for _ in range(draw.randint(0, batch_size))]
            B, T, places = packed(lengths, 30, 8)
            taken = [
                (row, t)
                for (row, start), length in zip(places, lengths, strict=True)
                for t in range(start, start + length)
            ]
            assert len(set(taken)) == len(taken) == sum(lengths)
            assert all(0 <= row < B and 0 <= t < T for row, t in taken)
            assert (T, max(1, sum(lengths) / T) <= B <= batch_size) == (32, True)


def test_short_samples_fill_what_long_ones_leave():
    assert packed([5, 7, 5, 2, 4, 2, 5, 1, 6], 10, 1)[:2] == (4, 10)  # 37 tokens


def test_a_packed_batch_holds_every_sample_with_its_targets_places_and_points():
    apart, batch = collate(SAMPLES, 0, 1, 3), collate(SAMPLES, 0, 1, 3, PACKING)
    assert len(batch.input_BT) < len(SAMPLES)
    assert batch.position_BT is not None
    assert batch.sample_BT is not None
    for number, (ids, is_target) in enumerate(SAMPLES):
        own_BT = batch.sample_BT == number
        assert batch.input_BT[own_BT].tolist() == ids[:-1].tolist()
        assert batch.target_BT[own_BT].tolist() == ids[1:].tolist()
        assert batch.mask_BT[own_BT].tolist() == is_target[1:].tolist()
        assert batch.position_BT[own_BT].tolist() == list(range(len(ids) - 1))
        points, expected = (one.points_SM[number][one.points_SM[number] >= 0] for one in (batch, apart))
        assert torch.equal(batch.target_BT.flatten()[points], apart.target_BT.flatten()[expected])
        assert bool((batch.sample_BT.flatten()[points] == number).all())
    assert not batch.mask_BT[batch.sample_BT == -1].any()
    assert batch.target_rows_N.tolist() == batch.mask_BT.flatten().nonzero().flatten().tolist()


def test_no_samples_make_a_packed_batch_of_padding():
    batch = collate([], 0, 8, 3, 20)
    assert (batch.input_BT.shape, batch.points_SM.tolist()) == ((1, 24), [[-1] * 3])
    assert not batch.mask_BT.any()


# ---- the same steps ----


@pytest.mark.parametrize("num_processes", [1, 2])
def test_packing_changes_no_step(num_processes: int):
    """Which samples each micro-batch of each process takes, and
    what the step counts, also from a later step on."""

    def steps(process: int, start_step: int = 0, **keys: object) -> list[StepBatch]:
        config = Config.model_validate(
            {"batch_size": 2, "gradient_accumulation_steps": 2, "max_seq_length": 40, **keys}
        )
        where = {
            "process_index": process,
            "num_processes": num_processes,
            "num_steps": 5,
            "start_step": start_step,
        }
        return list(
            training_steps(
                SAMPLES,
                config,
                config,
                agents=[0],
                points_per_row=config.swd_points_per_row,
                pad_id=0,
                **where,
            )
        )

    def learnt(batch: Batch) -> list[int]:
        return sorted(batch.target_BT[batch.mask_BT].tolist())

    for process in range(num_processes):
        apart, together = steps(process), steps(process, packing=True)
        for one, other in zip(apart, together, strict=True):
            assert one[1:] == other[1:]
            assert [learnt(batch) for batch in one.micro_batches] == [
                learnt(batch) for batch in other.micro_batches
            ]
        later = steps(process, 3, packing=True)
        for one, other in zip(together[3:], later, strict=True):
            for batch, again in zip(one.micro_batches, other.micro_batches, strict=True):
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(batch, again, strict=True)
                    if a is not None and b is not None
                )


# ---- the same losses and gradients ----


def of_samples(nll_KBT: Tensor, batch: Batch) -> list[Tensor]:
    """The NLL of each sample's target tokens, in order."""
    number_BT = batch.sample_BT
    if number_BT is None:
        number_BT = torch.arange(len(SAMPLES))[:, None].expand(batch.input_BT.shape)
    return [nll_KBT[:, (number_BT == number) & batch.mask_BT] for number in range(len(SAMPLES))]


def assert_packing_changes_nothing(apart: Agents, together: Agents) -> None:
    batches = collate(SAMPLES, 0, 1, 3), collate(SAMPLES, 0, 1, 3, PACKING)
    (one, gradients), (other, packed_gradients) = (
        run(agents, batch, lambda_sw=0.5) for agents, batch in zip((apart, together), batches, strict=True)
    )
    for expected, found in zip(
        of_samples(one.nll_KBT, batches[0]), of_samples(other.nll_KBT, batches[1]), strict=True
    ):
        assert max_difference(found, expected) < EXACT
    for identity, gradient in gradients.items():
        assert max_difference(packed_gradients[identity], gradient) < EXACT, identity


@EVERY_MODE
@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_packed_samples_get_the_losses_and_gradients_of_rows_of_their_own(mode: Mode, recompute: Recompute):
    agents = partial(toy_agents, mode, dropconnect_p=0.4)
    assert_packing_changes_nothing(agents(), agents(gradient_checkpointing=recompute))


def test_packed_samples_in_compiled_layers():
    torch._dynamo.reset()
    assert_packing_changes_nothing(toy_agents("fused"), toy_agents("fused", compiled="aot_eager"))


def test_packed_samples_in_flex_attention(monkeypatch: pytest.MonkeyPatch):
    """Uncompiled: PyTorch has its forward and backward in plain
    operators, but lets nobody train with it on a CPU."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(WrappedFlexAttention, "_is_flex_compiled", False)
    assert_packing_changes_nothing(toy_agents("fused"), toy_agents("fused", attention="flex_attention"))


@pytest.mark.parametrize("representation", ["tokens", "mean", "last"])
def test_the_distance_compares_the_same_points(representation):
    batches = collate(SAMPLES, 0, 1, 3), collate(SAMPLES, 0, 1, 3, PACKING)
    agents = toy_agents("fused")
    (one, one_valid), (other, other_valid) = (
        cloud(agents(batch).hidden_KBTD, batch, representation, len(SAMPLES) + 2) for batch in batches
    )
    assert torch.equal(one_valid, other_valid)
    assert max_difference(other[:, other_valid], one[:, one_valid]) < EXACT


def test_the_checks_above_catch_samples_that_see_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        attention, "packed_sequence_mask_function", lambda sample_NT: lambda *places: sample_NT[0, 0] == 0
    )
    with pytest.raises(AssertionError):
        assert_packing_changes_nothing(toy_agents("fused"), toy_agents("fused"))
