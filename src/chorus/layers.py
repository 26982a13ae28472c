"""How each decoder layer runs in training: compiled, recomputed in backward, both or neither."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from chorus.adapters import Routing
from chorus.errors import InputError


def prepare_layers(model: PreTrainedModel, routing: Routing, *, recompute: bool, compiled: bool | str) -> None:
    """Have torch compile each decoder layer, and recompute it in backward under the turn of its forward pass.

    A layer is wrapped and not the model: equal layers are compiled once, for all of them. In evaluation mode the layers
    run as they are: its shapes change with every batch. The recomputation is not transformers' own, which lies inside
    of a layer's forward, where it would be compiled with it.

    Raises:
        InputError: the architecture does not mark its layers as ones that may be recomputed.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for key, wanted in (("use_gradient_checkpointing", recompute), ("compile", compiled)):
        if wanted and not layers:
            raise InputError(f"key {key!r}: {type(model).__name__} does not support it; set it to false")
    if compiled:
        # Kinds of layers x shapes; running out of it would be a silent return to uncompiled layers.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in layers:
        plain = run = layer.forward
        if compiled:
            run = torch.compile(run, backend=compiled if isinstance(compiled, str) else "inductor")
        if recompute:
            # No draw of ours comes from the global generators, so there is no state of theirs to preserve.
            context_fn = routing.checkpoint_contexts
            run = partial(checkpoint, run, use_reentrant=False, context_fn=context_fn, preserve_rng_state=False)
        if recompute or compiled:
            layer.forward = partial(_run, layer, plain, run)


def _run(layer: nn.Module, plain: Callable, in_training: Callable, *args: Any, **kwargs: Any) -> Any:
    return (in_training if layer.training else plain)(*args, **kwargs)
