"""The bases of the benchmarks: Gemma-2 shapes with random weights."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

GEMMA_2 = {"vocab_size": 256_000, "head_dim": 256, "max_position_embeddings": 8192, "sliding_window": 4096}
SHAPES = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    },
    "gemma-2-2b": GEMMA_2
    | {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
    },
    "gemma-2-9b": GEMMA_2
    | {
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
    },
}

# Bases of other families: the class, and its configuration. What is left out is the class's default.
_GEMMA_3_4B = {
    "vocab_size": 262_208,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
}
_GEMMA_4_E4B = {
    "vocab_size": 262_144,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 42,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 18,
    "final_logit_softcapping": 30.0,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 7,
    "max_position_embeddings": 131_072,
}
MORE_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-4b": ("Gemma3ForConditionalGeneration", {"text_config": _GEMMA_3_4B}),
    "gemma-4-e4b": ("Gemma4ForCausalLM", _GEMMA_4_E4B),
    "llama-3.2-1b": (
        "LlamaForCausalLM",
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": (
        "Qwen3ForCausalLM",
        {
            "vocab_size": 151_936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
        },
    ),
}


def config_of(name: str) -> PretrainedConfig:
    return Gemma2Config(**SHAPES[name]) if name in SHAPES else AutoConfig.from_pretrained(name)


def random_base(name: str, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """A frozen base of a shape above, made on `device`; or the
    model of a hub id or folder, with its weights."""
    if name not in SHAPES:
        config = AutoConfig.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation=attention
        )
        return model.to(device).requires_grad_(False)
    config = Gemma2Config(**SHAPES[name], dtype=dtype, attn_implementation=attention)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Gemma2ForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
