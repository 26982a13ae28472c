"""The memory of one micro-batch, run through the real code on torch's meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface

from chorus.config import RunConfig
from chorus.config.per_agent import largest
from chorus.data.batches import Batch
from chorus.mesh import Mesh
from chorus.model import token_nll
from chorus.model.adapters import lora_shape
from chorus.model.agents import Agents, build_agents, masks_of
from chorus.model.attention import choose_attention
from chorus.model.base import Head, load_skeleton
from chorus.model.execution import Execution, decide_execution
from chorus.model.regularisation import Regularisation
from chorus.planning.forecast import Machine
from chorus.planning.live_bytes import (
    CountedPasses,
    ExpertProducts,
    LiveBytes,
    fused_attention,
    undrawn_noise,
)
from chorus.spans import listening
from chorus.training.objective import objective_of

FUSED_ATTENTION = "chorus_forecast"
MOST_COUNTED = (
    12  # agents; larger numbers are extrapolated linearly, because building thousands takes minutes
)


def agents_of_a_pass(config: RunConfig) -> int:
    """How many agents share one pass through the base."""
    return (
        min(config.agents_per_pass or config.num_agents, config.num_agents)
        if config.parallel_mode == "fused"
        else 1
    )


class Counts(NamedTuple):
    """What is counted of one micro-batch, in bytes; all of it linear in the agents and in those of a pass.

    Attributes:
        elements: trained numbers of all agents.
        activations: live before the last loss.
        after_forward: live before the backward pass, without `gradients`.
        peak: at most, without `gradients`.
        loss: on top of `activations`, while the loss is computed.
        gradients: what the losses keep for the backward pass.
    """

    elements: int
    activations: int
    after_forward: int
    peak: int
    loss: int
    gradients: int


def count(config: RunConfig, dtype: torch.dtype, length: int, machine: Machine) -> tuple[Agents, Counts]:
    """The counts of a run, and agents without values: only some of them where there are many."""
    num_agents, at_once = config.num_agents, agents_of_a_pass(config)
    if num_agents <= MOST_COUNTED:
        return _counts_of(config, dtype, length, machine)

    def of(num_agents: int, at_once: int) -> tuple[Agents, Counts]:
        more = {"num_agents": num_agents, "agents_per_pass": at_once if at_once < num_agents else None}
        return _counts_of(config.model_copy(update=more), dtype, length, machine)

    if at_once == num_agents:  # all in one pass
        (_, few), (agents, many) = of(4, 4), of(8, 8)
        return agents, _along(few, many, (num_agents - 8) / 4)
    held = min(4, at_once)  # two passes and three; then more agents in each
    (agents, two), (_, three) = of(2 * held, held), of(3 * held, held)
    counts = _along(two, three, (num_agents - 3 * held) / held)
    if held < at_once:
        _, larger = of(3 * held, held + 2)
        wider = (at_once - held) / 2
        counts = Counts(
            *(
                one + round((more - less) * wider)
                for one, less, more in zip(counts, three, larger, strict=True)
            )
        )
    return agents, counts


def _along(first: Counts, second: Counts, further: float) -> Counts:
    """Linear extrapolation: second + further x (second - first)."""
    return Counts(*(round(two + (two - one) * further) for one, two in zip(first, second, strict=True)))


def _counts_of(config: RunConfig, dtype: torch.dtype, length: int, machine: Machine) -> tuple[Agents, Counts]:
    execution = decide_execution(config, torch.device(machine.device_type), machine.base_in_shards)
    agents, passes = _agents_without_values(config, dtype, execution, machine)
    elements = sum(map(torch.numel, agents.adapters().values()))
    if machine.deepspeed is not None:
        agents.to(dtype)  # as DeepSpeed does
    with ExpertProducts():
        at_loss, after_forward, peak = _micro_batch(agents, passes, config.batch_size, length)
    rows = agents_of_a_pass(config) * config.batch_size * length
    loss, gradient = loss_bytes(agents.head(), rows, dtype, machine.device_type)
    losses = len(at_loss) if config.parallel_mode == "parallel" else 1  # whose gradients wait for backward
    activations = max(at_loss) + (losses - 1) * gradient
    return agents, Counts(elements, activations, after_forward, peak, loss, losses * gradient)


def _agents_without_values(
    config: RunConfig, dtype: torch.dtype, execution: Execution, machine: Machine
) -> tuple[Agents, CountedPasses | None]:
    """The agents on the meta device, and the runner of their passes if layers are compiled or passes
    captured.

    Layers are compiled only far enough to know what they save for backward.
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
    # With a value for each agent, the largest memory: agents of other processes may have it.
    rates = Regularisation(largest(config.dropconnect_p), largest(config.lora_dropout), config.seed)
    passes = None
    if execution.compiled or execution.captured:
        passes = CountedPasses(partial(masks_of, skeleton), execution.captured)
    shape, how = lora_shape(config), {"run_pass": passes, "draw": undrawn_noise}
    with torch.device("meta"):
        agents = build_agents(config.parallel_mode, skeleton, config.num_agents, shape, rates, counted, **how)
    return agents, passes


def _micro_batch(
    agents: Agents, passes: CountedPasses | None, rows: int, length: int
) -> tuple[list[int], int, int]:
    """Bytes that live before each loss of a micro-batch, before its backward pass, and at most. It has no
    targets: loss is counted apart."""
    batch, live, at_loss, after_forward = batch_without_values(rows, length), LiveBytes(), [], 0

    @contextmanager
    def note(name: str) -> Iterator[None]:
        if name == "task_loss":
            at_loss.append(live.now)
        yield

    def run() -> None:
        nonlocal after_forward
        output = agents(batch, step=0)
        after_forward = live.now
        output.hidden_KBTD.backward(torch.empty_like(output.hidden_KBTD))

    if passes is not None:  # layers compile in the first run, which is not counted
        with torch._dynamo.config.patch(
            automatic_dynamic_shapes=False
        ):  # so that earlier forecasts do not count
            run()
        agents.zero_grad()
    with listening(note), live if passes is None else passes.counted_by(live):
        run()
    return at_loss, after_forward, live.peak


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


class _Alike(Mesh):
    """A mesh whose other processes are copies of this one."""

    def gather_rows(self, own: Tensor) -> Tensor:
        return torch.cat([own] * self.data_size)

    def gather_agents(self, own: Tensor) -> Tensor:
        return torch.cat([own] * self.agent_size)


def diversity_bytes(
    config: RunConfig, dtype: torch.dtype, head: Head, length: int, machine: Machine
) -> tuple[int, int]:
    """Peak bytes of the distance between agents, forward and backward, and the bytes of hidden_KBTD's
    gradient."""
    rows, width = config.batch_size, head.weight_VD.shape[1]
    hidden_KBTD = torch.empty(
        config.num_agents, rows, length, width, dtype=dtype, device="meta", requires_grad=True
    )
    nll_KBT = torch.empty(hidden_KBTD.shape[:3], device="meta")
    points_SM = torch.empty(rows, min(config.swd_points_per_row, length), dtype=torch.int64, device="meta")
    batch = batch_without_values(rows, length)._replace(points_SM=points_SM)
    objective = objective_of(config, config, _Alike(machine.agent_size, machine.mesh.data_size), head)
    with LiveBytes() as live:
        objective(nll_KBT, hidden_KBTD, batch, num_targets=1, step=0).share.backward()
    return live.peak, hidden_KBTD.nbytes


def batch_without_values(rows: int, length: int) -> Batch:
    """B = `rows` rows of T = `length` tokens, on the meta device, and no target among them."""
    ids_BT = torch.empty(rows, length, dtype=torch.int64, device="meta")
    nothing_N = torch.empty(0, dtype=torch.int64, device="meta")
    return Batch(ids_BT, ids_BT, ids_BT.bool(), nothing_N, ids_BT[:, :1])
