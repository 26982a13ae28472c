"""The independent reference of everything that an ensemble says: stock PEFT and transformers, row by row."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from toy import ALPHA, RANK, TARGETS, VOCABULARY, tiny_gemma
from transformers import PreTrainedTokenizerFast

from chorus.model.agents import Agents


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


def stock_model(
    agents: Agents, member: int | None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """The toy base, or stock PEFT over it with one agent's
    weights copied in: no layer, cache or loop of Chorus."""
    base = tiny_gemma(dtype=dtype).eval()
    make_lively(dict(base.named_parameters()))
    if member is None:
        return base.to(device)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
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
