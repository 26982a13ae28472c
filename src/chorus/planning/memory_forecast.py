"""Forecast how much memory of each device a run needs, before any weight is read.

There is no formula for each architecture. One micro-batch runs through all layers of the real code on torch's
meta device, where tensors have shapes but no values, and the live bytes of storages are counted. So the
forecast follows the code for modes, groups of agents, gradient checkpointing, compiled layers and attention
scores. The rest is added by arithmetic: optimizer state and its sharding, the engine's buffers, and the loss
as a GPU computes it.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any, cast

import psutil
import torch
from transformers import PreTrainedModel

from chorus.config import RunConfig
from chorus.ensemble.decoding_batch import PROMPTS_ON_A_CPU
from chorus.ensemble.scoring import TOKENS_PER_PASS
from chorus.model.agents import Agents
from chorus.model.quantisation import bits_of_base, spared_bytes
from chorus.planning.counted_passes import batch_without_values, count, diversity_bytes, loss_bytes
from chorus.planning.forecast import GIB, Forecast, Machine
from chorus.planning.live_bytes import ExpertProducts, LiveBytes, bytes_of
from chorus.training.engine import DTYPES

# Measured: what a GPU's allocator reserved beyond all that is counted, whatever the model. 0.5 to 1.5 GiB in
# 22 of 29 rows on an H200, up to 2.7 in the others (benchmarks/LOG.md): the libraries' workspaces, and gaps
# between blocks.
GPU_REMAINDER = GIB


def forecast(config: RunConfig, precision: str, machine: Machine, length: int | None = None) -> Forecast:
    """The memory that a run of this configuration needs on each process's device.

    Args:
        precision: "no", "fp16" or "bf16": `mixed_precision` with "auto" already decided.
        length: T of the longest batch, in training and evaluation; None is the longest that the configuration
        allows.

    Raises:
        InputError: no such model, or target modules, checkpointing or compilation that it does not have.
    """
    dtype = DTYPES[precision]
    length = length or longest_batch(config)
    own = config.model_copy(update={"num_agents": config.num_agents // machine.agent_size})  # of a process
    agents, counts = count(own, dtype, length, machine)
    base = cast(PreTrainedModel, agents.peft_model(agents.agents[0]).get_base_model())
    spared, largest = spared_bytes(base, bits_of_base(config, agents.config))
    standing = base_bytes(bytes_of(agents.frozen_tensors().values()) - spared, dtype, machine)
    if largest:
        standing["a weight, dequantised"] = largest
    if machine.base_in_shards and config.lambda_sw > 0 and config.swd_space == "probabilities":
        standing["a copy of the head"] = agents.head().weight_VD.nbytes
    standing |= trained_bytes(counts.elements, config, dtype, machine)
    if machine.device_type == "cpu":
        standing = {"Python and its libraries": psutil.Process().memory_info().rss} | standing
    else:
        standing = {"libraries, and gaps": GPU_REMAINDER} | standing
    activations, loss, diversity = counts.activations, counts.loss, 0
    if config.lambda_sw > 0:
        compared, gradient_of_all = diversity_bytes(own, dtype, agents.head(), length, machine)
        diversity = max(0, counts.after_forward + counts.gradients + compared - activations)
        loss += gradient_of_all  # backward runs through the distance first, and its gradient is kept
    backward = counts.peak + counts.gradients - activations
    scoring = _scoring_bytes(config, agents, length, machine)
    trainable = counts.elements * machine.agent_size
    return Forecast(standing, activations, loss, diversity, backward, scoring, trainable)


def longest_batch(config: RunConfig) -> int:
    """T of the longest batch that the configuration allows."""
    return ceil((config.max_seq_length - 1) / config.padding) * config.padding


def base_bytes(whole: int, dtype: torch.dtype, machine: Machine) -> dict[str, int]:
    """Bytes on a process for a base of `whole` bytes: all, or under stage 3 a shard and gathered layers."""
    if not machine.base_in_shards:
        return {"base": whole}
    zero = (machine.deepspeed or {})["zero_optimization"]
    at_once = _number(zero, "stage3_max_live_parameters", 1e9) + _number(
        zero, "stage3_prefetch_bucket_size", 5e7
    )
    is_offloaded = ((zero.get("offload_param") or {}).get("device") or "none") != "none"
    share = 0 if is_offloaded else ceil(whole / machine.num_processes)
    return {"base, its share": share, "base, put together": min(whole - share, dtype.itemsize * at_once)}


def trained_bytes(elements: int, config: RunConfig, dtype: torch.dtype, machine: Machine) -> dict[str, int]:
    """Bytes on a process for the `elements` trainable numbers of its agents: weights, AdamW's two moments,
    the engine's buffers.

    Plain: everything in fp32 on every process. ZeRO (Rajbhandari et al. 2020): the live weights in the run's
    precision on every process; a share of fp32 weights and moments and, from stage 2, of gradients; buckets
    of a fixed size.
    """
    if machine.deepspeed is None:
        parts = {"adapters": 4 * elements, "optimizer": 8 * elements}
        if machine.mesh.data_size > 1:
            parts["buckets of DDP"] = 4 * elements
        elif config.gradient_accumulation_steps > 1:
            parts["gradients of earlier micro-batches"] = 4 * elements
        return parts
    zero = machine.deepspeed["zero_optimization"]
    share = ceil(elements / machine.mesh.data_size)
    is_offloaded = ((zero.get("offload_optimizer") or {}).get("device") or "none") != "none"
    gradients = elements if zero["stage"] == 1 else share
    buckets = 0
    if zero.get("contiguous_gradients", True):
        buckets = _number(zero, "reduce_bucket_size", 5e8) * (2 if zero.get("overlap_comm") else 1)
    return {
        "adapters": dtype.itemsize * elements,
        "optimizer, its share": 0 if is_offloaded else 12 * share,
        "gradients and buckets of ZeRO": dtype.itemsize * (gradients + buckets),
    }


def _number(zero: Mapping[str, Any], key: str, default: float) -> int:
    """The JSON's number, or DeepSpeed's own default where the JSON has none."""
    value = zero.get(key, "auto")
    return int(default if value == "auto" else value)


def _scoring_bytes(config: RunConfig, agents: Agents, length: int, machine: Machine) -> int:
    """Bytes of scoring held-out rows under all members, or of writing all answers to some prompts, if larger.

    A prompt is answered in 2 K + 1 rows: the base and each agent by itself, and each agent for the mixture.
    Agents that are spread over processes are gathered for it. On a GPU decoding uses the free memory, so it
    needs only enough for one prompt at a time.
    """
    rows = min(config.eval_batch_size, ceil(config.eval_samples / machine.num_processes))
    if rows == 0:
        return 0
    members = config.num_agents + 1
    tokens = max(length, min(rows * length, TOKENS_PER_PASS[machine.device_type] // members)) * members
    prompts = 1 if machine.device_type == "cuda" else min(rows, PROMPTS_ON_A_CPU)
    texts = 2 * config.num_agents + 1
    agents.eval()
    dtype, head = next(iter(agents.frozen_tensors().values())).dtype, agents.head()
    with torch.no_grad(), ExpertProducts():
        with LiveBytes() as live:
            agents.agent_pass(0, batch_without_values(ceil(tokens / length), length))
        scoring = live.peak
        ids_BT = torch.empty(
            prompts, length + 1 + config.max_new_tokens_eval, dtype=torch.int64, device="meta"
        )
        with LiveBytes() as live, agents.trunk(0) as trunk:
            output = trunk(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=True)
            cache = live.now - output.last_hidden_state.nbytes
    logits = 3 * 4 * prompts * len(head.weight_VD)  # logits, log-probabilities, and their mixture; fp32
    scoring += loss_bytes(head, tokens, dtype, machine.device_type)[0]
    elsewhere = config.num_agents - config.num_agents // machine.agent_size
    adapters = elsewhere * agents.adapters()[0].nbytes
    return adapters + max(scoring, live.peak + (texts - 1) * cache + texts * logits)
