"""All that a run carries from step to step, under the one identity of a tensor, whatever engine holds it.

Learning rate, order of the rows and random draws are functions of the step, so weights and AdamW's state are all. Under
fp16 there is also the loss scale, which starts anew.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from chorus.adapters import TensorId
from chorus.engine import Engine, zero_stage
from chorus.errors import InputError
from chorus.partitions import MOMENTS, set_steps_taken, steps_taken
from chorus.sharding import make_whole


class TrainingState(NamedTuple):
    """On the CPU, in fp32.

    weights: every adapter tensor: the master weights.
    moments: AdamW's `exp_avg` and `exp_avg_sq`, each of the weights' shapes.
    optimizer_step: steps that AdamW has taken, for its bias correction: one number, or one for each agent where a
        step of some was skipped.
    """

    weights: dict[TensorId, Tensor]
    moments: dict[str, dict[TensorId, Tensor]]
    optimizer_step: int | list[int]


def read_state(engine: Engine) -> TrainingState:
    """The engine's state after an optimiser step. A collective call."""
    tensors = engine.agents.adapter_tensors()
    if engine.is_deepspeed:
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = steps_taken(engine.module.optimizer)
        moments = {
            name: {
                identity: safe_get_full_optimizer_state(tensor, name).float().cpu()  # pyright: ignore
                for identity, tensor in tensors.items()
            }
            for name in MOMENTS
        }
    else:
        state = engine.optimizer.state
        steps = [int(state[group["params"][0]]["step"]) for group in engine.optimizer.param_groups]
        moments = {
            name: {identity: state[tensor][name].float().cpu() for identity, tensor in tensors.items()}
            for name in MOMENTS
        }
    return TrainingState(engine.adapter_values(), moments, steps[0] if len(set(steps)) == 1 else steps)


def restore_state(engine: Engine, state: TrainingState) -> None:
    """Put a state into an engine that has not stepped yet. Every process has read the same one.

    Raises:
        InputError: it has other tensors, or other shapes, than the agents.
    """
    _refuse_other_tensors(engine.agents.adapter_tensors(), state.weights)
    if zero_stage(engine.accelerator) == 3:
        _restore_shards(engine, state)
    elif engine.is_deepspeed:
        _restore_zero(engine, state)
    else:
        _restore_plain(engine, state)


@torch.no_grad()
def _restore_plain(engine: Engine, state: TrainingState) -> None:
    tensors = engine.agents.adapter_tensors()
    identities = {id(tensor): identity for identity, tensor in tensors.items()}
    for identity, tensor in tensors.items():
        tensor.copy_(state.weights[identity])
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer  # pyright: ignore  (Accelerate's wrapper)
    in_order = [identities[id(tensor)] for group in optimizer.param_groups for tensor in group["params"]]
    steps = dict(zip(engine.agents.agents, _steps_by_agent(engine, state), strict=True))
    own = {
        place: {
            "step": torch.tensor(float(steps[identity.agent])),
            **{name: state.moments[name][identity] for name in MOMENTS},
        }
        for place, identity in enumerate(in_order)
    }
    # torch's own loading puts each tensor, and the step count, where this kind of AdamW wants it.
    optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _restore_zero(engine: Engine, state: TrainingState) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    set_steps_taken(engine.module.optimizer, _steps_by_agent(engine, state))
    for identity, tensor in engine.agents.adapter_tensors().items():
        safe_set_full_fp32_param(tensor, state.weights[identity])
        tensor.copy_(state.weights[identity])
        for name in MOMENTS:
            safe_set_full_optimizer_state(tensor, state.moments[name][identity], name)


@torch.no_grad()
def _restore_shards(engine: Engine, state: TrainingState) -> None:
    """The same under stage 3, which cuts each tensor by itself into as many shards as there are processes."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    set_steps_taken(engine.module.optimizer, _steps_by_agent(engine, state))
    tensors = engine.agents.adapter_tensors()
    with GatheredParameters(tensors.values(), modifier_rank=0):
        for identity, tensor in tensors.items():
            tensor.copy_(state.weights[identity])
    for identity, tensor in tensors.items():
        size = cast(Any, tensor).ds_tensor.numel()  # of a shard, the last of which is padded

        def own(whole: Tensor, size: int = size) -> Tensor:
            padded = torch.nn.functional.pad(whole.flatten(), (0, size * engine.num_processes - whole.numel()))
            return padded.narrow(0, size * engine.process_index, size)

        safe_set_local_fp32_param(tensor, own(state.weights[identity]))
        for name in MOMENTS:
            safe_set_local_optimizer_state(tensor, own(state.moments[name][identity]), name)
    make_whole(list(tensors.values()))


def _steps_by_agent(engine: Engine, state: TrainingState) -> list[int]:
    steps = state.optimizer_step
    return [steps] * len(engine.agents.agents) if isinstance(steps, int) else steps


def _refuse_other_tensors(ours: Mapping[TensorId, Tensor], theirs: Mapping[TensorId, Tensor]) -> None:
    for identity in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(side[identity].shape) if identity in side else None for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"key 'resume_from_checkpoint': agent {identity.agent}, {identity.path} ({identity.matrix}) has shape "
                f"{shapes[1]} in the checkpoint and {shapes[0]} in this run (None: it has no such tensor); resume with "
                "the base and the adapters of the checkpoint"
            )
