"""`packing: auto`: packs samples where that is exact, known to be faster, and saves padding."""

from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PretrainedConfig
from transformers.utils.import_utils import is_flash_attn_2_available

from chorus.collectives import on_first_process
from chorus.config import Config
from chorus.data.order import epoch_order
from chorus.data.packing import Layout, one_a_row, packed
from chorus.errors import InputError
from chorus.model.attention import LONG, check_packing
from chorus.model.toy_base import toy_like
from chorus.planning.auto_agents import machine_of, newest_state

C = TypeVar("C", bound=Config)

# A step of gemma-2-2b with 62 % of the tokens took 72 % of the time (benchmarks/LOG.md, 8 samples of 64 to
# 512 tokens on an H200): a packed token costs 1.15 times an unpacked one, so 80 % of the tokens save nearly a
# tenth of the time.
WORTH_IT = 0.8
BATCHES = 64  # sampled


def decide_packing(
    config: C, lengths: np.ndarray, base: PretrainedConfig, accelerator: Accelerator
) -> tuple[C, str]:
    """The configuration with true or false for `packing`, and the reason, for the log ("" if it was given).

    A resumed run keeps the value of its checkpoint. A collective call with the same result on all processes.

    Args:
        lengths: tokens of every training row.
        base: configuration of the base.
    """
    if config.packing != "auto":
        return config, ""
    state = on_first_process(accelerator, lambda: newest_state(config))
    if state is not None:  # a checkpoint older than the key has none
        packs, why = state.config.model_dump().get("packing") is True, "as in the checkpoint"
    else:
        in_shards = machine_of(accelerator, config).base_in_shards
        packs, why = on_first_process(
            accelerator, lambda: packs_by_itself(config, lengths, base, accelerator.device, in_shards)
        )
    return config.model_copy(update={"packing": packs}), f"packing auto: {'on' if packs else 'off'}; {why}"


def packs_by_itself(
    config: Config, lengths: np.ndarray, base: PretrainedConfig, device: torch.device, in_shards: bool
) -> tuple[bool, str]:
    """Whether `auto` packs, and why."""
    against = _against(config, base, device, in_shards)
    if against is not None:
        return False, against
    share = share_of_tokens(config, np.minimum(lengths, config.max_seq_length) - 1)
    found = f"batches of these rows would have {share:.0%} of the tokens"
    if share > WORTH_IT:
        return False, f"{found}, and it pays from {WORTH_IT:.0%} on"
    try:
        check_packing(toy_like(config.model_name))
    except InputError as error:
        return False, f"{found}, but {str(error).partition(': ')[2].partition(';')[0]}"
    return True, found


def _against(config: Config, base: PretrainedConfig, device: torch.device, in_shards: bool) -> str | None:
    """Why packing is not exact here, or was not measured to be faster; None if nothing speaks against it."""
    has_softcap = bool(getattr(base.get_text_config(), "attn_logit_softcapping", None))
    wanted = config.attn_implementation
    by_flash = is_flash_attn_2_available() and (wanted == "auto" and has_softcap)
    by_flex = wanted == "flex_attention" or (wanted == "auto" and has_softcap and config.compile is not False)
    if device.type != "cuda":
        return f"no GPU ({device})"
    if in_shards:
        return "ZeRO stage 3, under which it was not measured"
    if config.drops_inputs:
        return "lora_dropout is above 0, and draws by places in a row"
    if wanted == "flash_attention_2":
        return "flash_attention_2 would let the samples of a row see each other"
    if config.max_seq_length >= LONG and (by_flash or not by_flex):
        return f"rows of {LONG} tokens or more, whose attention is faster without a mask"
    if config.batch_size == 1:
        return "batch_size is 1, so there is nothing to put together"
    return None


def share_of_tokens(config: Config, lengths: np.ndarray) -> float:
    """Tokens of packed batches, padding included, relative to batches with one sample per row."""
    order = epoch_order(len(lengths), config.seed, 0, config.shuffle).numpy()
    apart, together = list[Layout](), list[Layout]()
    for start in range(0, min(len(order), BATCHES * config.batch_size), config.batch_size):
        own = lengths[order[start : start + config.batch_size]].tolist()
        apart.append(one_a_row(own, config.padding))
        together.append(packed(own, config.max_seq_length - 1, config.padding))
    at_once = 1
    if config.per_agent_batches and isinstance(config.num_agents, int):
        at_once = config.num_agents  # any order of the rows is representative
    return _tokens(together, at_once) / _tokens(apart, at_once)


def _tokens(layouts: list[Layout], at_once: int) -> int:
    """Tokens of batches, where each group of batches is padded to its largest."""
    groups = [layouts[first : first + at_once] for first in range(0, len(layouts), at_once)]
    return sum(len(one) * max(own.B for own in one) * max(own.T for own in one) for one in groups)
