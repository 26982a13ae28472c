"""What several test files need: a Gemma-2 with every Gemma-2
feature, a batch, agents that differ and their step."""

from collections.abc import Callable
from itertools import product
from typing import Any, cast, get_args

import torch
from sampling import pairwise
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from chorus.config.per_agent import NumberOrList
from chorus.data.batches import Batch, Sample
from chorus.mesh import ALONE, Mesh
from chorus.model.adapters import LoraShape, TensorId
from chorus.model.agents import AgentOutput, Agents, Mode, Regularisation, RunPass, build_agents
from chorus.model.execution import Execution
from chorus.model.kernels.decoder_layers import Recompute
from chorus.training.diversity import SwdSettings
from chorus.training.objective import objective

VOCABULARY = 61
RANK = 3
ALPHA = 6.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# mode, gradient checkpointing, dropconnect_p, packing: what two ZeRO-2 processes are compared in
ZERO2_FACTORS = (get_args(Mode), get_args(Recompute), (0.0, 0.4), (False, True))
ZERO2_CASES = {"sample": pairwise(*ZERO2_FACTORS), "all": list(product(*ZERO2_FACTORS))}


def tiny_gemma(
    seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "eager", head_dim: int = 8
) -> Gemma2ForCausalLM:
    """Random weights; one sliding and one full layer, grouped queries, both soft-caps, a tied head."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        sliding_window=6,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,  # low, so that the caps bend what random weights give
        final_logit_softcapping=3.0,
        attn_implementation=attention,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(config).to(dtype).requires_grad_(False)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def small_llama() -> PreTrainedModel:
    return seeded(LlamaForCausalLM, LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2))


def small_gpt_neox() -> PreTrainedModel:
    """Biases, one linear for query, key and value, attention beside the MLP."""
    return seeded(GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL, num_attention_heads=4))


def seeded(kind: Callable, config: object) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).requires_grad_(False)


def toy_batch(rows: int = 4, length: int = 10, seed: int = 0, without_targets: int | None = 2) -> Batch:
    """Random tokens, right padding of different lengths, a
    prompt in every row and (one row) no target at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length + 1), generator=generator)
    mask_BT = torch.zeros(rows, length, dtype=torch.bool)
    points_SM = torch.full((rows, 3), -1)
    for row in range(rows):
        end = length - row % 3
        if row != without_targets:
            mask_BT[row, 2 + row % 2 : end] = True
            points_SM[row] = row * length + torch.tensor([2 + row % 2, (2 + row % 2 + end) // 2, end - 1])
        ids[row, end + 1 :] = 0
    return Batch(ids[:, :-1], ids[:, 1:], mask_BT, mask_BT.flatten().nonzero().squeeze(1), points_SM)


def toy_samples(count: int = 7, longest: int = 15, seed: int = 0) -> list[Sample]:
    """Random tokens of 3 to `longest`, so that some go beyond
    the sliding window; each learns its last half."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    return [Sample(ids_T, torch.arange(len(ids_T)) >= len(ids_T) // 2) for ids_T in ids]


def toy_shape(
    random_init: bool = False,
    seed: int = 0,
    alpha: NumberOrList = ALPHA,
    init_gain: NumberOrList = 1.0,
) -> LoraShape:
    return LoraShape(RANK, alpha, TARGETS, random_init, seed, init_gain=init_gain)


def toy_agents(
    mode: Mode,
    *,
    num_agents: int = 3,
    gradient_checkpointing: Recompute = "none",
    dropconnect_p: NumberOrList = 0.0,
    dropout_p: NumberOrList = 0.0,
    alpha: NumberOrList = ALPHA,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    device: str = "cpu",
    attention: str = "eager",
    head_dim: int = 8,
    run_pass: RunPass | None = None,
    mesh: Mesh = ALONE,
    **execution: Any,
) -> Agents:
    """Agents on a tiny Gemma-2. `trained` gives A and B values
    of everyday size, so that agents really differ."""
    rates = Regularisation(dropconnect_p, dropout_p, seed=7)
    base = tiny_gemma(dtype=dtype, attention=attention, head_dim=head_dim).to(device)
    how = Execution(recompute=gradient_checkpointing, **execution)
    shape = toy_shape(alpha=alpha)
    agents = build_agents(mode, base, num_agents, shape, rates, how, run_pass, mesh=mesh)
    if trained:
        for identity, tensor in agents.adapter_tensors().items():
            generator = torch.Generator().manual_seed(hash_of(str(identity)))
            tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return agents


def gradients_of(agents: Agents) -> dict[TensorId, Tensor]:
    """The gradient of every matrix of every agent."""
    return agents.named(
        {agent: cast(Tensor, adapter_F.grad) for agent, adapter_F in agents.adapters().items()}
    )


def coupled_objective(output: AgentOutput, batch: Batch, lambda_sw: float = 0.5) -> Tensor:
    """The whole objective, so that gradients flow through token losses and hidden states."""
    return objective(
        *output,
        batch,
        num_targets=len(batch.target_rows_N),
        num_micro_batches=1,
        lambda_sw=lambda_sw,
        swd=SwdSettings(5, "tokens", 0),
        step=3,
        rows_per_process=len(batch.points_SM),
        gather=lambda own: own,
    ).share


def run(
    agents: Agents, batch: Batch, step: int | None = 3, lambda_sw: float = 0.5
) -> tuple[AgentOutput, dict]:
    """Output and gradients of one coupled step."""
    agents.zero_grad()
    output = agents(batch, step=step, slot=1)
    coupled_objective(output, batch, lambda_sw).backward()
    return output, gradients_of(agents)


def hash_of(text: str) -> int:
    """A stable hash: Python's own differs from process to process."""
    return sum(ord(letter) * 31**place % 1_000_003 for place, letter in enumerate(text))


def max_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference relative to the largest magnitude of `b`."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
