"""The count of useful work, beside torch's own count of what a forward pass multiplies."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from toy import tiny_gemma, toy_agents, toy_batch, toy_samples

from chorus.data.batches import collate, collate_apart
from chorus.model.agents import causal_lm
from chorus.monitoring.flops import work_of


def test_it_is_torchs_count_of_the_base_with_half_of_the_attention_and_a_backward_without_weight_gradients():
    base, rows, length = tiny_gemma(), 2, 10
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        base(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False)
    work = work_of(base)
    products = work._replace(attention=0).useful_flops(rows, length, rows * length)
    attention = work._replace(body=0, head=0).useful_flops(rows, length, 0)
    # Some versions of transformers make the positions' angles by a matrix product.
    angles = sum(
        sum(by.values()) for name, by in counter.get_flop_counts().items() if name.endswith("rotary_emb")
    )
    assert counter.get_total_flops() - angles == round(products / 2 + 2 * attention / 3)


def test_the_head_counts_for_targets_alone():
    work = work_of(tiny_gemma())
    assert work.useful_flops(3, 10, 12) - work.useful_flops(3, 10, 11) == 4 * work.head


def test_packed_samples_meet_themselves_alone_and_padding_is_computed():
    work, batch = work_of(tiny_gemma()), toy_batch(rows=2, length=10)
    assert work.of_batch(batch, 3) == work.useful_flops(6, 10, 3 * len(batch.target_rows_N))
    sample_BT = torch.tensor([[0] * 3 + [1] * 7, [1] * 4 + [-1] * 6])
    products = work._replace(attention=0).useful_flops(6, 10, 3 * len(batch.target_rows_N))
    attention = sum(3 * 2 * length**2 * work.attention for length in (3, 7, 4))
    assert work.of_batch(batch._replace(sample_BT=sample_BT), 3) == products + 3 * attention


def test_rows_of_each_agents_own_count_once():
    work, samples = work_of(tiny_gemma()), toy_samples(6, longest=9)
    for packing in (None, 20):
        own = [samples[:3], samples[3:]]
        T = max(len(sample.ids) for sample in samples) - 1
        alone = [collate(rows, 0, T, packing=packing) for rows in own]
        together = collate_apart(own, 0, T, packing)
        assert len({len(batch.input_BT) for batch in alone}) == 1, "equal numbers of rows, so equal padding"
        assert work.of_batch(together, 2) == sum(work.of_batch(batch, 1) for batch in alone)


def test_adapters_are_not_the_bases():
    assert work_of(causal_lm(toy_agents("fused").peft_model(0))) == work_of(tiny_gemma())
