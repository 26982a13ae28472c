"""Compiled layers over rows of other numbers and lengths than the first."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chorus.data.batches import Sample, collate
from chorus.model.adapters import LoraShape
from chorus.model.agents import Agents, Regularisation, build_agents
from chorus.model.execution import Execution

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def agents_of(compiled: bool | str) -> Agents:
    """Over a Llama of nine heads and three key heads, as SmolLM2-135M has them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    base = LlamaForCausalLM(config).requires_grad_(False)
    shape = LoraShape(2, 4.0, TARGETS, random_init=True, seed=0)
    return build_agents("fused", base, 2, shape, Regularisation(0, 0, 0), Execution(compiled=compiled))


@pytest.mark.slow
def test_a_smaller_last_batch_after_rows_of_two_lengths_is_compiled_and_exact():
    """Without rows that stay as they are this compiles for many minutes, and does not end."""
    compiled, plain = agents_of("aot_eager"), agents_of(False)
    for rows, length in ((8, 16), (8, 24), (7, 16), (7, 24)):
        ids_BT = torch.randint(3, 60, (rows, length + 1), generator=torch.Generator().manual_seed(rows))
        batch = collate([Sample(ids, torch.ones(length + 1, dtype=torch.bool)) for ids in ids_BT], pad_id=0)
        outputs = [agents(batch, step=0).hidden_KBTD for agents in (compiled, plain)]
        torch.testing.assert_close(*outputs)
        for hidden_KBTD in outputs:
            hidden_KBTD.square().mean().backward()
    for agent, adapter_F in compiled.adapters().items():
        torch.testing.assert_close(adapter_F.grad, plain.adapters()[agent].grad)
