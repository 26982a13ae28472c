"""Decoder layers compiled for decoding, one token a row over a static cache.

A layer finds its cache by its own number, which torch.compile takes for a constant: every layer would be compiled for
itself. Here each is handed its own part of the cache and has no number, so equal layers are compiled once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer

from chorus.model.kernels.joined_linears import joining


class LayerCache:
    """One layer's part of a `StaticCache`, in which it stands for the whole cache."""

    def __init__(self, layer: Any):
        self.keys, self.values, self.filled = layer.keys, layer.values, layer.cumulative_length

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """As `StaticLayer.update` for one token."""
        column = self.filled.view(1)
        self.keys.index_copy_(2, column, key)
        self.values.index_copy_(2, column, value)
        self.filled.add_(1)
        return self.keys, self.values


@contextmanager
def compiled_layers(model: PreTrainedModel, caches: StaticCache) -> Iterator[None]:
    """Run the decoder layers compiled, for passes of one token over `caches`."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [vars(layer).get("forward") for layer in layers]
    numbered = [module for layer in layers for module in layer.modules() if "layer_idx" in vars(module)]
    numbers = [module.layer_idx for module in numbered]
    for layer, own in zip(layers, caches.layers, strict=True):
        vars(layer)["forward"] = partial(_run, layer, LayerCache(own))
    for module in numbered:
        module.layer_idx = 0  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for module, number in zip(numbered, numbers, strict=True):
            module.layer_idx = number
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = own


def _run(layer: nn.Module, own: LayerCache, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
    _mark_sizes(layer, own, [*args, *kwargs.values()])
    return _compiled(type(layer))(layer, *args, past_key_values=own, **kwargs)


def _mark_sizes(layer: nn.Module, own: LayerCache, inputs: list[Any]) -> None:
    """Tell torch.compile which sizes differ from batch to batch: rows, columns of the caches, groups of rows."""
    for tensor in inputs:
        for part in tensor if isinstance(tensor, tuple) else [tensor]:
            if isinstance(part, Tensor):
                torch._dynamo.maybe_mark_dynamic(part, [0, 3] if part.ndim == 4 else [0])
    for tensor in (own.keys, own.values):
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 2])
    for module in layer.modules():
        for tensor in vars(module).get("active_weights") or ():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


@cache
def _compiled(kind: type[nn.Module]) -> Callable[..., Any]:
    return torch.compile(kind.forward, fullgraph=True, backend=joining("inductor"))
