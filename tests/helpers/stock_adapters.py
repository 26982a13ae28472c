"""Two adapters of different ranks and targets over the bundled base, by stock PEFT alone."""

from pathlib import Path
from typing import Any

import torch
from launching import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = str(ROOT / "assets" / "tiny-gemma-2")


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")


def write_adapters(folder: Path) -> list[Path]:
    for name, rank, targets in (("one", 2, ["q_proj", "down_proj"]), ("other", 4, ["o_proj"])):
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(base(), config)
        generator = torch.Generator().manual_seed(rank)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(folder / name))
    return [folder / "one", folder / "other"]


def stock_text(adapter: Path | None, prompt_ids: list[int], max_new_tokens: int) -> str:
    """What transformers writes after these tokens, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = base() if adapter is None else PeftModel.from_pretrained(base(), str(adapter))
    how = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": 0}
    ids = model.eval().generate(input_ids=torch.tensor([prompt_ids]), **how)
    return tokenizer.decode(ids[0, len(prompt_ids) :], skip_special_tokens=True)
