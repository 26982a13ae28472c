"""DeepSpeed ZeRO stage 3: the frozen base is sharded, with a part of each matrix on every process.

DeepSpeed gathers a module's own parameters while that module runs. Where Chorus reads parameters of another
module, it registers them: a LoRA layer reads those of its inner linear layer, the loss those of the head. The
adapters stay gathered, because a pass reads all of them at its start; their gradients and optimizer state are
sharded, as under stage 2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import nn

from chorus.model.adapters import lora_layers
from chorus.model.agents import Agents
from chorus.model.base import Head


def register_reads(agents: Agents) -> None:
    """Register with DeepSpeed the weights that a module reads from another module. DeepSpeed already holds
    the agents.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for peft_model in agents.peft_models:
        for layer in lora_layers(peft_model).values():
            for weight in layer.base_layer.parameters(recurse=False):
                register_external_parameter(layer, weight)
    for weight in agents.head().linear.parameters(recurse=False):
        register_external_parameter(agents, weight)


def whole_copy(head: Head) -> Head:
    """A full copy of the output layer on every process, unknown to DeepSpeed. A collective call."""
    from deepspeed.runtime.zero import GatheredParameters

    shards = dict(head.linear.named_parameters(recurse=False))
    with GatheredParameters(list(shards.values())):
        whole = {name: weight.detach().clone() for name, weight in shards.items()}
    V, D = whole["weight"].shape
    linear = nn.Linear(D, V, bias="bias" in whole, device="meta")
    linear.load_state_dict(whole, assign=True)
    return replace(head, linear=linear.requires_grad_(False))


def keep_gathered(zero: Any, adapters: Sequence[nn.Parameter]) -> None:
    """Make DeepSpeed's optimizer gather the adapters after every step, and shard them only for the step.

    By default it does so for all parameters below a threshold size, and most of a base's are smaller than an
    adapter. A collective call.
    """
    cut = [adapter_F for adapter_F in cast(Sequence[Any], adapters) if not adapter_F.ds_persist]
    for adapter_F in cut:
        adapter_F.ds_persist = True
    zero.persistent_parameters.extend(cut)
    gather_adapters(adapters)


def gather_adapters(adapters: Sequence[nn.Parameter]) -> None:
    """Gather the adapters, as DeepSpeed itself does after every step. A collective call."""
    cast(Any, adapters[0]).all_gather(list(adapters))


@contextmanager
def unsharded(module: nn.Module, adapters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The context in which every process holds the whole base, and processes may run different numbers of
    passes.

    Evaluation needs it: processes have different numbers of batches and of tokens to generate. Entering and
    leaving it are collective calls.
    """
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    with unwrap_model_for_generation(module):
        yield
    gather_adapters(adapters)
