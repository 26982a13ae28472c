"""Forecast how much memory of each device a run needs, before any weight is read.

There is no formula for an architecture. One micro-batch runs through the real code, every layer of it, on
torch's meta device, where tensors have shapes but no values, and the bytes of the storages that live at the
same time are counted. So the forecast follows the code in modes, groups of agents, gradient checkpointing,
compiled layers and attention scores. What that pass does not hold is added by arithmetic: optimizer state and
its sharding, an engine's buffers, and the loss as a GPU computes it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any, NamedTuple, cast

import psutil
import torch
from rich.table import Table
from transformers import AttentionInterface, PreTrainedModel

from chorus.config import RunConfig
from chorus.data.batches import Batch
from chorus.ensemble.decoding_batch import PROMPTS_ON_A_CPU
from chorus.ensemble.scoring import TOKENS_PER_PASS
from chorus.model import token_nll
from chorus.model.adapters import lora_shape
from chorus.model.agents import Agents, build_agents, masks_of
from chorus.model.attention import choose_attention
from chorus.model.base import Head, load_skeleton
from chorus.model.execution import Execution, decide_execution
from chorus.model.quantisation import bits_of_base, spared_bytes
from chorus.model.regularisation import Regularisation
from chorus.planning.live_bytes import CountedPasses, LiveBytes, bytes_of, fused_attention, undrawn_noise
from chorus.spans import listening
from chorus.training.engine import DTYPES

GIB = 2**30
# Measured: what a GPU's allocator reserved beyond all that is counted, whatever the model. 0.5 to 1.5 GiB in
# 22 of 29 rows on an H200, up to 2.7 in the others (benchmarks/LOG.md): the libraries' workspaces, and gaps
# between blocks.
GPU_REMAINDER = GIB
FUSED_ATTENTION = "chorus_forecast"


class Machine(NamedTuple):
    """Where a process runs: its device type, the number of
    processes, and DeepSpeed's JSON if it is active."""

    device_type: str
    num_processes: int = 1
    deepspeed: Mapping[str, Any] | None = None

    @property
    def base_in_shards(self) -> bool:
        return self.deepspeed is not None and self.deepspeed["zero_optimization"]["stage"] == 3


class Forecast(NamedTuple):
    """Bytes on each device. A training step peaks at `standing` + activations + the larger of loss and
    backward.

    Attributes:
        standing: held during the whole step, by name.
        activations: held for the backward pass when the last loss is computed.
        loss: in addition, while the logits of a chunk exist.
        backward: in addition, in the backward pass; gradients included.
        evaluation: in addition to `standing`, while held-out rows are scored; 0 without any.
        trainable: trained numbers of all agents.
    """

    standing: dict[str, int]
    activations: int
    loss: int
    backward: int
    evaluation: int
    trainable: int

    @property
    def training(self) -> int:
        return sum(self.standing.values()) + self.activations + max(self.loss, self.backward)

    @property
    def peak(self) -> int:
        return max(self.training, sum(self.standing.values()) + self.evaluation)

    def report(self) -> dict[str, float]:
        """GiB by part, for JSON."""
        parts = {**self.standing, **{name: getattr(self, name) for name in self._fields[1:5]}}
        return {name: round(size / GIB, 3) for name, size in {**parts, "peak": self.peak}.items()}

    def table(self) -> Table:
        table = Table(title="memory forecast, for each process", title_justify="left")
        table.add_column("part")
        table.add_column("needs", justify="right")
        table.add_column("when")
        for name, size in self.standing.items():
            table.add_row(name, in_words(size), "always")
        table.add_row("activations", in_words(self.activations), "from forward to backward")
        for name, size in (("loss", self.loss), ("backward", self.backward)):
            what = (
                f"while {'the loss is computed' if name == 'loss' else 'backward runs, gradients included'}"
            )
            is_peak = size == max(self.loss, self.backward) and self.training == self.peak
            table.add_row(name, in_words(size), what if is_peak else f"{what} (not at the peak)")
        if self.evaluation:
            beside = "in place of the three above" + (
                "" if self.peak > self.training else " (not at the peak)"
            )
            table.add_row("evaluation", in_words(self.evaluation), beside)
        table.add_section()
        table.add_row("peak", in_words(self.peak), "")
        return table


def in_words(size: int) -> str:
    """A number of bytes for people: `9.31 GiB`, or `5.0 MiB` where it is little."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


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
    execution = decide_execution(config, torch.device(machine.device_type), machine.base_in_shards)
    agents, passes = _agents_without_values(config, dtype, execution, machine)
    elements = sum(map(torch.numel, agents.adapters().values()))
    base = cast(PreTrainedModel, agents.peft_model(agents.agents[0]).get_base_model())
    spared, largest = spared_bytes(base, bits_of_base(config, agents.config))
    standing = base_bytes(bytes_of(agents.frozen_tensors().values()) - spared, dtype, machine)
    if largest:
        standing["a weight, dequantised"] = largest
    standing |= trained_bytes(elements, config, dtype, machine)
    if machine.device_type == "cpu":
        standing = {"Python and its libraries": psutil.Process().memory_info().rss} | standing
    else:
        standing = {"libraries, and gaps": GPU_REMAINDER} | standing
    if machine.deepspeed is not None:
        agents.to(dtype)  # as DeepSpeed does

    at_loss, step_peak = _micro_batch(agents, passes, config.batch_size, length)
    losses = len(at_loss) if config.parallel_mode == "parallel" else 1  # whose gradients wait for backward
    rows = agents_of_a_pass(config) * config.batch_size * length
    loss, gradient = loss_bytes(agents.head(), rows, dtype, machine.device_type)
    activations = max(at_loss) + (losses - 1) * gradient
    backward = step_peak + losses * gradient - activations
    scoring = _scoring_bytes(config, agents, length, machine)
    return Forecast(standing, activations, loss, backward, scoring, elements)


def longest_batch(config: RunConfig) -> int:
    """T of the longest batch that the configuration allows."""
    return ceil((config.max_seq_length - 1) / config.padding) * config.padding


def agents_of_a_pass(config: RunConfig) -> int:
    """How many agents share one pass through the base."""
    return (
        min(config.agents_per_pass or config.num_agents, config.num_agents)
        if config.parallel_mode == "fused"
        else 1
    )


def base_bytes(whole: int, dtype: torch.dtype, machine: Machine) -> dict[str, int]:
    """What each process holds of a base of `whole` bytes: all,
    or under stage 3 a share and the gathered layers."""
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
    """What each process holds for `elements` trainable numbers: weights, AdamW's two moments, the engine's
    buffers.

    Plain: everything in fp32 on every process. ZeRO (Rajbhandari et al. 2020): the live weights in the run's
    precision on every process; a share of fp32 weights and moments and, from stage 2, of gradients; buckets
    of a fixed size.
    """
    if machine.deepspeed is None:
        parts = {"adapters": 4 * elements, "optimizer": 8 * elements}
        if machine.num_processes > 1:
            parts["buckets of DDP"] = 4 * elements
        elif config.gradient_accumulation_steps > 1:
            parts["gradients of earlier micro-batches"] = 4 * elements
        return parts
    zero = machine.deepspeed["zero_optimization"]
    share = ceil(elements / machine.num_processes)
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


def loss_bytes(head: Head, rows: int, dtype: torch.dtype, device_type: str) -> tuple[int, int]:
    """Peak bytes of the loss over `rows` tokens, and the bytes that it keeps: the gradient of hidden_ND."""
    V, D = head.weight_VD.shape
    hidden_ND = torch.empty(rows, D, dtype=dtype, device="meta", requires_grad=True)
    if device_type == "cuda":  # compiled: only a chunk's logits, which their gradient overwrites
        chunk = min(rows, max(1, token_nll.CHUNK_ELEMENTS // V))
        gradient = hidden_ND.nbytes
        # Backward scales it in fp32, casts it, and copies it into the gradient of all rows.
        return max(2 * gradient + chunk * V * dtype.itemsize, 3 * gradient + 4 * rows * D), gradient
    ids_N = torch.empty(rows, dtype=torch.int64, device="meta")
    with LiveBytes() as live:
        nll_BT = token_nll.token_nll(hidden_ND[None], ids_N[None], ids_N, head)
        nll_BT.backward(torch.empty_like(nll_BT))
    return live.peak, hidden_ND.nbytes


def _agents_without_values(
    config: RunConfig, dtype: torch.dtype, execution: Execution, machine: Machine
) -> tuple[Agents, CountedPasses | None]:
    """The agents on the meta device, and what carries out their passes if layers are compiled or passes
    captured.

    Layers are compiled only as far as it takes to know what they keep.
    """
    skeleton = load_skeleton(config.model_name, dtype).requires_grad_(False)
    attention = choose_attention(
        config.attn_implementation,
        skeleton.config,
        torch.device(machine.device_type),
        dtype,
        length=config.max_seq_length,
        compiled=bool(execution.compiled),
        packing=config.packs,
    )
    if attention != "eager":
        AttentionInterface.register(FUSED_ATTENTION, fused_attention)
        skeleton.set_attn_implementation(FUSED_ATTENTION)
    counted = replace(execution, captured=False)
    if execution.compiled:
        from chorus.planning.counted_kernels import COUNTED

        counted = replace(counted, compiled=COUNTED)
    rates = Regularisation(config.dropconnect_p, config.lora_dropout, config.seed)
    passes = None
    if execution.compiled or execution.captured:
        passes = CountedPasses(partial(masks_of, skeleton), execution.captured)
    shape, how = lora_shape(config), {"run_pass": passes, "draw": undrawn_noise}
    with torch.device("meta"):
        agents = build_agents(config.parallel_mode, skeleton, config.num_agents, shape, rates, counted, **how)
    return agents, passes


def _micro_batch(
    agents: Agents, passes: CountedPasses | None, rows: int, length: int
) -> tuple[list[int], int]:
    """Bytes that live before each loss of a micro-batch, and
    their peak. It has no targets: loss is counted apart."""
    batch, live, at_loss = _batch(rows, length), LiveBytes(), []

    @contextmanager
    def note(name: str) -> Iterator[None]:
        if name == "task_loss":
            at_loss.append(live.now)
        yield

    def run() -> None:
        output = agents(batch, step=0)
        output.hidden_KBTD.backward(torch.empty_like(output.hidden_KBTD))

    if passes is not None:  # layers compile in the first run, which is not counted
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # whatever was forecast before
            run()
        agents.zero_grad()
    with listening(note), live if passes is None else passes.counted_by(live):
        run()
    return at_loss, live.peak


def _scoring_bytes(config: RunConfig, agents: Agents, length: int, machine: Machine) -> int:
    """Bytes of scoring held-out rows under all members, or of writing all answers to some prompts, if larger.

    A prompt is answered in 2 K + 1 rows: the base and each agent by itself, and each agent for the
    mixture. On a GPU decoding fills the memory that is free, so one prompt at a time is all that it needs.
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
    with torch.no_grad():
        with LiveBytes() as live:
            agents.agent_pass(0, _batch(ceil(tokens / length), length))
        scoring = live.peak
        ids_BT = torch.empty(
            prompts, length + 1 + config.max_new_tokens_eval, dtype=torch.int64, device="meta"
        )
        with LiveBytes() as live, agents.trunk(0) as trunk:
            output = trunk(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=True)
            cache = live.now - output.last_hidden_state.nbytes
    logits = 3 * 4 * prompts * len(head.weight_VD)  # raw, as log-probabilities, and in their mixture; fp32
    scoring += loss_bytes(head, tokens, dtype, machine.device_type)[0]
    return max(scoring, live.peak + (texts - 1) * cache + texts * logits)


def _batch(rows: int, length: int) -> Batch:
    ids_BT = torch.empty(rows, length, dtype=torch.int64, device="meta")
    nothing_N = torch.empty(0, dtype=torch.int64, device="meta")
    return Batch(ids_BT, ids_BT, ids_BT.bool(), nothing_N, ids_BT[:, :1])
