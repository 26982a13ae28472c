"""The time of a step with stock PEFT, for quality.py: what K runs one after the other would take.

No data loader runs and rows are padded to the longest of their batch alone, so that a real run with stock
PEFT takes no less.
"""

from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from quality_runs import Bench
from timing import timed, warm_up
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

STEPS = 24
NO_TARGET = -100


def stock_ms_per_step(bench: Bench, model_name: str, rank: int) -> float:
    """Milliseconds of a step of one LoRA on the task's batches; nothing is compiled."""
    device = bench.accelerator.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype).to(device)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config)
    model.train()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-5, fused=device.type == "cuda" or None)
    batches = _batches(bench, device)
    taken = 0

    def step() -> None:
        nonlocal taken
        ids_BT, labels_BT = batches[taken % len(batches)]
        taken += 1
        model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    warm_up(step, device)
    return median(timed(step, STEPS, device))


def _batches(bench: Bench, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    rows, size = bench.rows, bench.settings["batch_size"]
    batches = []
    for first in range(0, min(len(rows.train), STEPS * size) - size + 1, size):
        samples = [rows.train[index] for index in range(first, first + size)]
        ids_BT = pad_sequence([one.ids for one in samples], batch_first=True, padding_value=rows.pad_id)
        labels = [one.ids.masked_fill(~one.is_target, NO_TARGET) for one in samples]
        labels_BT = pad_sequence(labels, batch_first=True, padding_value=NO_TARGET)
        batches.append((ids_BT.to(device), labels_BT.to(device)))
    return batches
