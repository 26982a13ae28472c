"""A small random base of the same architecture, for what must be tried where the real one does not fit."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from chorus.model.base_checks import model_errors_named


def write_toy_like(model_name: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `toy_like` and its tokenizer."""
    toy_like(model_name).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def toy_like(model_name: str) -> PreTrainedModel:
    """A base of the same architecture and vocabulary on the CPU, in fp32, with a few narrow random layers:
    always the same ones.

    Raises:
        InputError: no such model, or one with custom code.
    """
    with model_errors_named(model_name):
        config = AutoConfig.from_pretrained(model_name, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # pyright: ignore  # random weights are not quantised
        text, toy = config.get_text_config(), _narrow(config.get_text_config())
        if text is config:
            config = toy
        for name, value in list(vars(config).items()):
            if value is text:
                setattr(config, name, toy)
            elif isinstance(value, PretrainedConfig) and hasattr(value, "num_hidden_layers"):
                value.num_hidden_layers = 1  # of a tower, through which no text passes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)


def _narrow(text: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a text model with one layer of each kind, at least two, and small widths."""
    whole = text.to_dict()
    depth, heads = text.num_hidden_layers, min(4, text.num_attention_heads)
    key_heads = whole.get("num_key_value_heads") or text.num_attention_heads
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    layers = max(2, len(kinds))
    of_each_layer = {
        key: value[:layers] for key, value in whole.items() if isinstance(value, list) and len(value) == depth
    }
    if kinds:
        of_each_layer["layer_types"] = (kinds * layers)[:layers]
    small = {
        **{"hidden_size": 16 * heads, "intermediate_size": 32 * heads, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "head_dim": 16, "global_head_dim": 16},
        **{"num_key_value_heads": heads if key_heads == text.num_attention_heads else heads // 2},
        **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 16, "laurel_rank": 8},  # Gemma 3n and 4
        **{"moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},  # DeepSeek
    }
    small = {
        text.attribute_map.get(key, key): value for key, value in small.items()
    }  # n_embd is GPT-2's hidden_size
    known = whole.keys() | ({"global_head_dim"} if "per_layer_config" in whole else set())
    small = {key: value for key, value in small.items() if key in known and whole.get(key, 1)}
    if isinstance(whole.get("intermediate_size"), list):
        del small["intermediate_size"]
        of_each_layer["intermediate_size"] = [32 * heads] * layers
    kept = {
        key: value
        for key, value in whole.items()
        if key not in ("per_layer_config", "num_global_key_value_heads")
    }
    return type(text)(**{**kept, **of_each_layer, **small})
