"""Agents over the bundled base, and stock PEFT models of the same weights: they answer one by one."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from chorus.data.rows import HeldOutRow, HeldOutRows
from chorus.data.samples import Sample
from chorus.data.templates import Problem
from chorus.model.adapters import LoraShape
from chorus.model.agents import Agents

BASE = str(Path(__file__).parents[2] / "assets" / "tiny-gemma-2")
SHAPE = LoraShape(4, 8.0, ("q_proj", "o_proj", "gate_proj", "down_proj"), random_init=True, seed=5)
NUM_AGENTS = 3
MEMBERS = (None, *range(NUM_AGENTS))
MAX_NEW_TOKENS = 8
PROMPTS = (
    "Question: Ada has 12 apples. Ben gives Ada 7 more. How many apples does Ada have now?\nAnswer:",
    "Question: 3 + 4?\nAnswer:",
    "A story of one line.\n",
    "There are 9 shelves, and each shelf holds 4 coins. How many coins are on the shelves?\nAnswer:",
    "Two and two make",
)


def stock_model(agents: Agents, member: int | None) -> Any:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    if member is None:
        return base.eval()
    config = LoraConfig(
        r=SHAPE.rank,
        lora_alpha=int(SHAPE.alpha),
        target_modules=list(SHAPE.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    parameters = dict(model.named_parameters())
    for identity, tensor in agents.adapter_tensors().items():
        if identity.agent == member:
            parameters[f"{identity.path}.lora_{identity.matrix}.default.weight"].data.copy_(tensor)
    return model.eval()


def stock_text(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def stock_nll_N(model: Any, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> Tensor:
    """Cross-entropy of completion and end token under the
    model's own logits, one unpadded row after another."""
    parts = []
    for prompt, completion in ((one.prompt, one.completion) for one in problems):
        encoding = tokenizer(prompt + completion, return_offsets_mapping=True)
        ids = [*encoding["input_ids"], tokenizer.eos_token_id]
        starts = [start for start, end in encoding["offset_mapping"] if end > start >= len(prompt)]
        num_targets = len(starts) + 1
        logits_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        parts.append(cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="none")[-num_targets:])
    return torch.cat(parts)


def held_out(problems: list[Problem], tokenizer: PreTrainedTokenizerBase) -> HeldOutRows:
    eos_id = tokenizer.eos_token_id
    rows = []
    for prompt, completion in ((one.prompt, one.completion) for one in problems):
        asked = tokenizer(prompt)["input_ids"]
        answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([*asked, *answer, eos_id])
        rows.append(HeldOutRow(asked, answer, Sample(ids, torch.arange(len(ids)) >= len(asked))))
    return HeldOutRows(rows, [eos_id])
