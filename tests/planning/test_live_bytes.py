"""What is counted as living, and what stands in for what cannot run without values."""

from functools import partial

import pytest
import torch
from toy import tiny_gemma, toy_agents, toy_batch

from chorus.model.agents import masks_of
from chorus.planning.live_bytes import CountedPasses, LiveBytes, bytes_of, fused_attention


def test_counting_ends_where_nothing_holds_a_tensor_any_more():
    outside = torch.ones(1 << 16)
    with LiveBytes() as live:
        view = outside.view(-1, 2)
        made = view + 1
        assert live.now == made.nbytes  # not what was there before, nor a view of it
        del made
    assert (live.now, live.peak) == (0, outside.nbytes)


def test_a_storage_is_counted_once_and_its_views_not_at_all():
    tensor = torch.ones(1000)
    assert bytes_of([tensor, tensor[:10], torch.ones(5)]) == 4000 + 20


def test_a_captured_pass_holds_the_peak_of_its_forward_and_backward_between_replays():
    batch = toy_batch(without_targets=None).to("meta")
    batch = batch._replace(target_rows_N=batch.target_rows_N[:0])

    def peak(captured: bool) -> tuple[int, int]:
        live, passes = LiveBytes(), CountedPasses(partial(masks_of, tiny_gemma()), captured)
        agents = toy_agents("fused", run_pass=passes).to("meta")
        with passes.counted_by(live):
            agents(batch, step=0).hidden_KBTD.sum().backward()
        agents.zero_grad()
        return live.peak, live.now

    (plain_peak, plain_left), (recorded_peak, recorded_left) = peak(False), peak(True)
    assert plain_left < plain_peak / 2
    assert recorded_left > 0.8 * plain_peak  # what it replays into stays
    assert recorded_peak < 1.5 * plain_peak


def test_attention_without_scores_keeps_its_inputs_its_output_and_a_number_a_row():
    query = torch.empty(2, 4, 64, 16, device="meta", requires_grad=True)
    key, value = (torch.empty(2, 2, 64, 16, device="meta", requires_grad=True) for _ in range(2))
    with LiveBytes() as live:
        output, _ = fused_attention(None, query, key, value, None)
        assert output.shape == (2, 64, 4, 16)
        assert live.now == 2 * query.nbytes + 4 * 2 * 4 * 64  # as computed, and in the order of the rows
        output.sum().backward()
    assert key.grad is not None
    assert key.grad.shape == key.shape


@pytest.mark.parametrize("size", [1, 512, 513])
def test_sizes_are_those_that_an_allocator_hands_out(size: int):
    with LiveBytes() as live:
        tensor = torch.empty(size, dtype=torch.uint8, device="meta")
        assert live.now == (512 if size <= 512 else 1024)
        del tensor
