"""The bases of the benchmarks: Gemma-2 shapes with random weights."""

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
