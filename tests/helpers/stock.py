"""The independent reference of everything that an ensemble says: stock PEFT and transformers, row by row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from toy import ALPHA, RANK, TARGETS, VOCABULARY, tiny_gemma
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from chorus.model.agents import Agents

# LoRA adapters that differ in rank, scaling and layers.
ADAPTERS: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"},
    {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["down_proj", "q_proj"],
        "rank_pattern": {"layers.0.mlp.down_proj": 4},
        "alpha_pattern": {"layers.1.mlp.down_proj": 3},
    },
    {"r": 4, "lora_alpha": 4, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]},
]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each id of the toy's vocabulary: w3 is 3."""
    words = {f"w{n}": n for n in range(VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w1", bos_token="w2")


def make_lively(base: Mapping[str, Tensor]) -> None:
    """Let the layers outweigh the embedding: with a random tied
    head a text would be one token over and over."""
    for name, tensor in base.items():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            tensor.fill_(4.0)


def write_base(folder: Path) -> Path:
    """The toy base and its tokenizer, as files."""
    model = tiny_gemma()
    make_lively(dict(model.named_parameters()))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base: str | Path, folder: Path, seed: int, **settings: Any) -> None:
    """An adapter that adds something, made by stock PEFT alone."""
    config = LoraConfig(**settings, task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        get_peft_model(stock_base(base), config).save_pretrained(str(folder), save_embedding_layers=False)


def stock_base(base: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")


def stock_model(
    agents: Agents,
    member: int | None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    alpha: float = ALPHA,
) -> Any:
    """The toy base, or stock PEFT over it with one agent's
    weights copied in: no layer, cache or loop of Chorus."""
    base = tiny_gemma(dtype=dtype).eval()
    make_lively(dict(base.named_parameters()))
    if member is None:
        return base.to(device)
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    parameters = dict(model.named_parameters())
    for identity, tensor in agents.adapter_tensors().items():
        if identity.agent == member:
            parameters[f"{identity.path}.lora_{identity.matrix}.default.weight"].data.copy_(tensor)
    return model.to(device, dtype).eval()


def stock_greedy(model: Any, prompt: Sequence[int], max_new_tokens: int, end_id: int) -> list[int]:
    """transformers' own greedy search, without the end token."""
    ids_BT = torch.tensor([list(prompt)], device=model.device)
    written = model.generate(
        input_ids=ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_id,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return written[: written.index(end_id)] if end_id in written else written


@torch.no_grad()
def next_log_probs(
    models: Sequence[Any], weights: Sequence[float], ids: Sequence[int], temperature: float
) -> Tensor:
    """log q_V of the models' mixture after a text, from plain probabilities in float64."""
    logits_KV = torch.stack([model(input_ids=torch.tensor([list(ids)])).logits[0, -1] for model in models])
    assert logits_KV.dtype == torch.float64
    pooled_V = (torch.tensor(weights, dtype=torch.float64)[:, None] * logits_KV.softmax(-1)).sum(0)
    return (pooled_V.log() / temperature).log_softmax(-1)


def entropy(log_prob_V: Tensor) -> float:
    return float(-(log_prob_V.exp() * log_prob_V).sum())
