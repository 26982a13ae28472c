"""All that a run carries from step to step, under the one identity of a tensor, whatever engine holds it.

Learning rate, order of the rows and random draws are functions of the step, so weights and AdamW's state are all. Under
fp16 there is also the loss scale, which starts anew.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chorus.adapters import TensorId
from chorus.engine import Engine
from chorus.errors import InputError
from chorus.isolation import MOMENTS


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

        adamw: Any = engine.module.optimizer.optimizer  # pyright: ignore
        moments = {
            name: {
                identity: safe_get_full_optimizer_state(tensor, name).float().cpu()  # pyright: ignore
                for identity, tensor in tensors.items()
            }
            for name in MOMENTS
        }
    else:
        adamw = engine.optimizer
        state = adamw.state
        moments = {
            name: {identity: state[tensor][name].float().cpu() for identity, tensor in tensors.items()}
            for name in MOMENTS
        }
    steps = [int(adamw.state[group["params"][0]]["step"]) for group in adamw.param_groups]
    return TrainingState(engine.adapter_values(), moments, steps[0] if len(set(steps)) == 1 else steps)


def restore_state(engine: Engine, state: TrainingState) -> None:
    """Put a state into an engine that has not stepped yet. Every process has read the same one.

    Raises:
        InputError: it has other tensors, or other shapes, than the agents.
    """
    _refuse_other_tensors(engine.agents.adapter_tensors(), state.weights)
    if engine.is_deepspeed:
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
    steps = _steps_by_agent(engine, state)
    own = {
        place: {"step": torch.tensor(steps[identity.agent]), **{m: state.moments[m][identity] for m in MOMENTS}}
        for place, identity in enumerate(in_order)
    }
    # torch's own loading puts each tensor, and the step count, where this kind of AdamW wants it.
    optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def _restore_zero(engine: Engine, state: TrainingState) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    zero: Any = engine.module.optimizer
    steps = _steps_by_agent(engine, state).values()
    for flat, step in zip(zero.single_partition_of_fp32_groups, steps, strict=True):
        zero.optimizer.state[flat]["step"].fill_(step)
    for identity, tensor in engine.agents.adapter_tensors().items():
        safe_set_full_fp32_param(tensor, state.weights[identity])
        tensor.copy_(state.weights[identity])
        for name in MOMENTS:
            safe_set_full_optimizer_state(tensor, state.moments[name][identity], name)


def _steps_by_agent(engine: Engine, state: TrainingState) -> dict[int, float]:
    agents, steps = engine.agents.agents, state.optimizer_step
    steps = [steps] * len(agents) if isinstance(steps, int) else steps
    return dict(zip(agents, map(float, steps), strict=True))


def _refuse_other_tensors(ours: Mapping[TensorId, Tensor], theirs: Mapping[TensorId, Tensor]) -> None:
    for identity in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(side[identity].shape) if identity in side else None for side in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"key 'resume_from_checkpoint': agent {identity.agent}, {identity.path} ({identity.matrix}) has shape "
                f"{shapes[1]} in the checkpoint and {shapes[0]} in this run (None: it has no such tensor); resume with "
                "the base and the adapters of the checkpoint"
            )
