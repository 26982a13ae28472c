"""A tiny random model of every family of bases that Chorus is
tried on, with some layers of each of its kinds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from toy import ALPHA, RANK, VOCABULARY, hash_of
from transformers import PreTrainedModel

from chorus.model.adapters import LoraShape
from chorus.model.agents import Agents, Mode, Regularisation, build_agents
from chorus.model.execution import Execution

AGENTS = 2

IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    **IDS,
}
HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
HEAD_DIM = {"head_dim": 8}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
SOFTCAPS |= {"attn_implementation": "eager"}  # some versions' sdpa, their default, leaves the soft-cap out
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP |= {"image_size": 8, "patch_size": 4}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
KINDS = ["sliding_attention", "full_attention"]
GEMMA_3N = {**SIZE, **HEADS, **HEAD_DIM, **PER_LAYER, "layer_types": KINDS * 2, "num_hidden_layers": 4}
GEMMA_3N |= {"num_kv_shared_layers": 2, "sliding_window": 6, "laurel_rank": 4, "altup_num_inputs": 2}
GEMMA_3N |= {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size": [48] * 4}
GEMMA_4 = {**SIZE, **HEADS, **HEAD_DIM, **SLIDING, "hidden_size_per_layer_input": 0, "global_head_dim": 16}
GEMMA_4_SHARED = {
    **GEMMA_4,
    **PER_LAYER,
    "layer_types": KINDS * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
GEMMA_4_SHARED |= {"use_double_wide_mlp": True}
GEMMA_4_EXPERTS = {**GEMMA_4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
GEMMA_4_EXPERTS |= {"moe_intermediate_size": 16, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
GEMMA_4_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GEMMA_4_VISION |= {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4}
GEMMA_4_AUDIO = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OUTSIDE = {"image_token_id": 58, "video_token_id": 57, "audio_token_id": 56}
LINEAR_ATTENTION = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
LINEAR_ATTENTION |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}


def _gemma_3_multimodal() -> PreTrainedModel:
    text = {**SIZE, **HEADS, **HEAD_DIM, **SLIDING, "query_pre_attn_scalar": 8}
    kinds = {"text_config": text, "vision_config": SIGLIP, "mm_tokens_per_image": 4}
    marks = {"image_token_index": 58, "boi_token_index": 57, "eoi_token_index": 56}
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**kinds, **marks))


def _gemma_4_multimodal(text: dict[str, Any], **audio: Any) -> PreTrainedModel:
    kinds = {"text_config": text, "vision_config": GEMMA_4_VISION, **audio}
    return transformers.Gemma4ForConditionalGeneration(transformers.Gemma4Config(**kinds, **OUTSIDE))


def _of(name: str, *settings: dict[str, Any], **more: Any) -> Callable[[], PreTrainedModel]:
    """A causal language model of the family whose classes are called `name`."""
    merged: dict[str, Any] = {key: value for part in (*settings, more) for key, value in part.items()}

    def make() -> PreTrainedModel:
        kind = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
        return kind(getattr(transformers, f"{name}Config")(**merged))

    return make


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma": _of("Gemma", SIZE, HEADS, HEAD_DIM),
    "gemma-2": _of("Gemma2", SIZE, HEADS, HEAD_DIM, SLIDING, SOFTCAPS),
    "gemma-3": _of("Gemma3Text", SIZE, HEADS, HEAD_DIM, SLIDING, query_pre_attn_scalar=8),
    "gemma-3 multimodal": _gemma_3_multimodal,
    "gemma-3n": _of("Gemma3nText", GEMMA_3N),
    "gemma-4": _of("Gemma4Text", GEMMA_4),
    "gemma-4 shared": _of("Gemma4Text", GEMMA_4_SHARED),
    "gemma-4 experts": _of("Gemma4Text", GEMMA_4_EXPERTS),
    "gemma-4 multimodal": partial(_gemma_4_multimodal, GEMMA_4),
    "gemma-4 multimodal shared": partial(_gemma_4_multimodal, GEMMA_4_SHARED, audio_config=GEMMA_4_AUDIO),
    "gemma-4 multimodal experts": partial(_gemma_4_multimodal, GEMMA_4_EXPERTS),
    "vaultgemma": _of("VaultGemma", SIZE, HEADS, HEAD_DIM, SLIDING, SOFTCAPS),
    "llama": _of("Llama", SIZE, HEADS),
    "qwen2": _of("Qwen2", SIZE, HEADS),
    "qwen3": _of("Qwen3", SIZE, HEADS, HEAD_DIM),
    "qwen3.5": _of("Qwen3_5Text", SIZE, HEADS, HEAD_DIM, LINEAR_ATTENTION),
    "mistral": _of("Mistral", SIZE, HEADS, sliding_window=6),
    "phi-3": _of("Phi3", SIZE, HEADS),
    "smollm3": _of("SmolLM3", SIZE, HEADS),
    "olmo-2": _of("Olmo2", SIZE, HEADS),
    "granite": _of(
        "Granite", SIZE, HEADS, logits_scaling=4.0, attention_multiplier=0.3, residual_multiplier=0.5
    ),
    "cohere2": _of("Cohere2", SIZE, HEADS, SLIDING, logit_scale=0.25),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **NO_DROPOUT)),
    "gpt-oss": _of("GptOss", SIZE, HEADS, HEAD_DIM, SLIDING, num_experts_per_tok=2, num_local_experts=4),
    "mixtral": _of("Mixtral", SIZE, HEADS, num_experts_per_tok=2, num_local_experts=4),
    "qwen3-moe": _of("Qwen3Moe", SIZE, HEADS, HEAD_DIM, EXPERTS),
    "deepseek-v3": _of(
        "DeepseekV3",
        SIZE,
        HEADS,
        {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        {"moe_intermediate_size": 16, "num_key_value_heads": 4},
    ),
}


def of_family(name: str) -> PreTrainedModel:
    """A model of the family with the same random weights at every call, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[name]().eval().requires_grad_(False)


def agents_of(
    family: str,
    mode: Mode = "fused",
    targets: str = "auto",
    dtype: torch.dtype = torch.float32,
    **execution: Any,
) -> Agents:
    """Agents that differ, on the family's tiny model."""
    shape, rates = LoraShape(RANK, ALPHA, targets, False, 0), Regularisation(0, 0, 7)
    base = of_family(family).to(dtype)
    agents = build_agents(
        mode, base.to(execution.pop("device", "cpu")), AGENTS, shape, rates, Execution(**execution)
    )
    for identity, tensor in agents.adapter_tensors().items():
        generator = torch.Generator().manual_seed(hash_of(str(identity)))
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return agents
