"""DeepSpeed ZeRO stage 3: the frozen base in shards, a part of each matrix on every process.

DeepSpeed gathers a module's own parameters while that module runs. Where Chorus reads parameters of another
module, it registers them: a LoRA layer reads those of the linear layer inside of it, the loss those of the
head. The adapters stay gathered, because a pass reads all of them at its start; their gradients and optimizer
state are in shards, as under stage 2. So does the head, where a loss reads it beside the passes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from chorus.model.adapters import lora_layers
from chorus.model.agents import Agents


def register_reads(agents: Agents) -> None:
    """Register with DeepSpeed, which already holds the agents, the
    weights that a module reads of another module."""
    from deepspeed.runtime.zero import register_external_parameter

    for peft_model in agents.peft_models:
        for layer in lora_layers(peft_model).values():
            for weight in layer.base_layer.parameters(recurse=False):
                register_external_parameter(layer, weight)
    for weight in agents.head().linear.parameters(recurse=False):
        register_external_parameter(agents, weight)


def keep_gathered(zero: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Have DeepSpeed's optimizer gather these parameters after every step, and shard those that it steps only
    for the step.

    By itself it does so for all parameters below one number of elements, and most of a base's are smaller
    than an adapter. A collective call.
    """
    cut = [parameter for parameter in cast(Sequence[Any], parameters) if not parameter.ds_persist]
    for parameter in cut:
        parameter.ds_persist = True
    zero.persistent_parameters.extend(cut)
    gather(parameters)


def gather(parameters: Sequence[nn.Parameter]) -> None:
    """Gather these parameters, as DeepSpeed itself does after every step. A collective call."""
    cast(Any, parameters[0]).all_gather(list(parameters))


@contextmanager
def unsharded(module: Any) -> Iterator[None]:
    """The context in which every process holds the whole base, and may run as many passes as it likes.

    Evaluation needs it: processes have different numbers of batches and of tokens to generate. Entering and
    leaving it are collective calls.
    """
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    with unwrap_model_for_generation(module):
        yield
    gather(module.optimizer.persistent_parameters)
