"""Attention over a KV cache, without the copy of keys and values that transformers' eager attention makes.

With grouped queries (Ainslie et al. 2023) several query heads share one key head. Eager attention repeats the
keys and values for each of them; in decoding that copy moves several times the bytes of the cache. Here the
query heads of a group are rows of one matrix product. The rest equals eager attention: soft-cap, mask,
softmax in fp32.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "chorus_grouped"
OWN = (
    "s_aux",
    "position_bias",
)  # transformers' names of arguments that only a model's own attention supports, such as sinks


def grouped_attention(
    module: nn.Module,
    query_NHTd: Tensor,
    key_NGLd: Tensor,
    value_NGLd: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Eager attention of H query heads over G key heads, G dividing H. Returns the output, N x T x H x d.

    With an argument of `OWN` it calls the model's own eager attention. The mask has the sliding window.
    """
    if any(kwargs.get(name) is not None for name in OWN):
        own = sys.modules[type(module).__module__].eager_attention_forward
        return own(
            module,
            query_NHTd,
            key_NGLd,
            value_NGLd,
            attention_mask,
            scaling=scaling,
            softcap=softcap,
            **kwargs,
        )
    N, H, T, d = query_NHTd.shape
    G, L = key_NGLd.shape[1:3]
    grouped = query_NHTd.reshape(N, G, H // G * T, d)
    score = torch.matmul(grouped, key_NGLd.mT) * (d**-0.5 if scaling is None else scaling)
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    score = score.view(N, H, T, L)
    if attention_mask is not None:
        score = score + attention_mask
    weight = score.softmax(-1, dtype=torch.float32).to(query_NHTd.dtype)
    out_NHTd = torch.matmul(weight.view(N, G, H // G * T, L), value_NGLd).view(N, H, T, -1)
    return out_NHTd.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)


@contextmanager
def attention_over_caches(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` with grouped attention, where its architecture lets attention be chosen."""
    configs = [model.config, model.config.get_text_config()] if model._supports_attention_backend else []
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
