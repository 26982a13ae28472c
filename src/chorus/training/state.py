"""The training state, by the identity of each tensor, independent of the engine.

Learning rate, order of the rows and random draws are functions of the step, so the state is weights and
AdamW's state. The loss scale of fp16 is not kept: it restarts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from chorus.errors import InputError
from chorus.model.adapters import TensorId
from chorus.training.engine import Engine, zero_stage
from chorus.training.zero.partitions import MOMENTS, set_steps_taken, steps_taken
from chorus.training.zero.stage3 import gather_adapters

FlatByAgent = Mapping[int, Tensor]  # laid out as each agent's adapter is


class TrainingState(NamedTuple):
    """On the CPU, in fp32.

    weights: every adapter tensor: the master weights. moments: AdamW's `exp_avg` and `exp_avg_sq`, each of
    the weights' shapes. optimizer_step: steps that AdamW has taken, for its bias correction: one number, or
    one for each agent where a
        step of some was skipped.
    """

    weights: dict[TensorId, Tensor]
    moments: dict[str, dict[TensorId, Tensor]]
    optimizer_step: int | list[int]


def read_state(engine: Engine) -> TrainingState:
    """The engine's state after an optimiser step. A collective call."""
    adapters = engine.agents.adapters()
    if engine.is_deepspeed:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = steps_taken(engine.module.optimizer)
        moments = {
            name: {agent: safe_get_full_optimizer_state(own, name) for agent, own in adapters.items()}
            for name in MOMENTS
        }
    else:
        states = {agent: engine.optimizer.state[own] for agent, own in adapters.items()}
        steps = [int(own["step"]) for own in states.values()]
        moments = {name: {agent: own[name] for agent, own in states.items()} for name in MOMENTS}
    named = {name: engine.to_host(cast("FlatByAgent", own)) for name, own in moments.items()}
    device = engine.accelerator.device
    steps = engine.mesh.gather_agents(torch.tensor(steps, device=device)).tolist()
    return TrainingState(engine.adapter_values(), named, steps[0] if len(set(steps)) == 1 else steps)


def restore_state(engine: Engine, state: TrainingState) -> None:
    """Put a state into an engine that has not stepped yet. Every process has read the same state.

    Raises:
        InputError: its tensors or shapes differ from the agents'.
    """
    held, num_agents = engine.agents.agents, len(engine.agents.agents) * engine.mesh.agent_size
    elsewhere = set(range(num_agents)).difference(held)
    theirs = {identity: own for identity, own in state.weights.items() if identity.agent not in elsewhere}
    _refuse_other_tensors(engine.agents.adapter_tensors(), theirs)
    weights = engine.agents.joined(state.weights)
    moments = {name: engine.agents.joined(own) for name, own in state.moments.items()}
    steps = state.optimizer_step
    steps = [steps] * len(held) if isinstance(steps, int) else [steps[agent] for agent in held]
    if engine.is_deepspeed:
        set_steps_taken(engine.module.optimizer, steps)
    if zero_stage(engine.accelerator) == 3:
        _restore_shards(engine, weights, moments)
    elif engine.is_deepspeed:
        _restore_zero(engine, weights, moments)
    else:
        _restore_plain(engine, weights, moments, steps)


@torch.no_grad()
def _restore_plain(
    engine: Engine, weights: FlatByAgent, moments: Mapping[str, FlatByAgent], steps: Sequence[int]
) -> None:
    for agent, adapter_F in engine.agents.adapters().items():
        adapter_F.copy_(weights[agent])
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer  # pyright: ignore  (Accelerate's wrapper)
    own = {
        place: {"step": torch.tensor(float(steps[place])), **{name: moments[name][agent] for name in MOMENTS}}
        for place, agent in enumerate(engine.agents.agents)
    }
    # load_state_dict puts each tensor, and the step count, on the device where fused AdamW needs it.
    optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _restore_zero(engine: Engine, weights: FlatByAgent, moments: Mapping[str, FlatByAgent]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for agent, adapter_F in engine.agents.adapters().items():
        safe_set_full_fp32_param(adapter_F, weights[agent])
        adapter_F.copy_(weights[agent])
        for name in MOMENTS:
            safe_set_full_optimizer_state(adapter_F, moments[name][agent], name)


@torch.no_grad()
def _restore_shards(engine: Engine, weights: FlatByAgent, moments: Mapping[str, FlatByAgent]) -> None:
    """The same under stage 3, which shards each adapter separately over the processes."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    adapters = engine.agents.adapters()
    with GatheredParameters(adapters.values(), modifier_rank=0):
        for agent, adapter_F in adapters.items():
            adapter_F.copy_(weights[agent])
    for agent, adapter_F in adapters.items():
        size = cast(Any, adapter_F).ds_tensor.numel()  # elements of a shard; the last shard is padded

        def own(whole_F: Tensor, size: int = size) -> Tensor:
            padded = torch.nn.functional.pad(whole_F, (0, size * engine.mesh.data_size - whole_F.numel()))
            return padded.narrow(0, size * engine.mesh.data_index, size)

        safe_set_local_fp32_param(adapter_F, own(weights[agent]))
        for name in MOMENTS:
            safe_set_local_optimizer_state(adapter_F, own(moments[name][agent]), name)
    gather_adapters(list(adapters.values()))


def _refuse_other_tensors(ours: Mapping[TensorId, Tensor], theirs: Mapping[TensorId, Tensor]) -> None:
    for identity in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(side[identity].shape) if identity in side else None for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"key 'resume_from_checkpoint': agent {identity.agent}, {identity.path} ({identity.matrix}) "
                f"has shape {shapes[1]} in the checkpoint and {shapes[0]} in this run (None: it has no such "
                "tensor); resume with the base and the adapters of the checkpoint"
            )
