"""Passes of several members together: which rows of a batch belong to which member.

A member is an agent or, as None, the base without an adapter. A lane is one module tree and the members that
use it: fused and sequential agents share one lane, in which each group of rows has its own adapter, the
base's group an adapter of zeros. Parallel agents have a lane each, and so has the base.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from chorus.model.adapters import BASE_ALONE, AdapterContext, adapter_context, lora_layers
from chorus.model.agents import Agents, ParallelAgents, causal_lm
from chorus.model.base import trunk_of

Member = int | None


@dataclass(frozen=True)
class Lane:
    """One module tree, and the groups of rows that pass through it.

    Attributes:
        name: the lane's member, or all of them.
        groups: indices of the caller's groups, whose rows lie one after the other in this order.
        context: the adapters of the rows, in the base's dtype: one for each group, or a single one for all
            rows.
    """

    agents: Agents
    model: PreTrainedModel
    name: Member | Literal["all"]
    groups: tuple[int, ...]
    context: AdapterContext

    @contextmanager
    def trunk(self, num_rows: int, length: int) -> Iterator[nn.Module]:
        """The trunk for a pass of `num_rows` rows, all of this lane, of `length` tokens each."""
        context = self.context._replace(num_tokens=num_rows * length, num_rows=num_rows)
        with self.agents.router.of(context):
            yield trunk_of(self.model)


def lanes_of(agents: Agents, members: Sequence[Member]) -> list[Lane]:
    """The lanes in which groups of rows, the g-th under `members[g]`, pass through the base."""
    if isinstance(agents, ParallelAgents):
        groups_of: dict[Member, list[int]] = {}
        for group, member in enumerate(members):
            groups_of.setdefault(member, []).append(group)
        return [_lane(agents, member, groups, [member]) for member, groups in groups_of.items()]
    return [_lane(agents, "all", range(len(members)), members)]


def _lane(
    agents: Agents, name: Member | Literal["all"], groups: Sequence[int], members: Sequence[Member]
) -> Lane:
    first = next((member for member in members if member is not None), None)
    peft_model = agents.peft_model(agents.agents[0] if first is None else first)
    model = causal_lm(peft_model)
    if first is None:
        return Lane(agents, model, name, tuple(groups), BASE_ALONE)
    with torch.no_grad():
        flat_GF = agents.weights(members)
        context = adapter_context(
            lora_layers(peft_model), agents.layout, range(len(members)), flat_GF, num_tokens=0, noise=None
        )
    return Lane(agents, model, name, tuple(groups), context)
