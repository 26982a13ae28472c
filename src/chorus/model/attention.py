"""The attention implementation of a run, and its masks."""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function
from transformers.utils.import_utils import is_flash_attn_2_available

from chorus.errors import InputError

logger = logging.getLogger(__name__)

# Above this row length attention's T x T scores cost more than what fused kernels lose elsewhere.
LONG = 1024


def choose_attention(
    wanted: str,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    length: int,
    compiled: bool,
    packing: bool,
) -> str | None:
    """`attn_implementation` with `auto` decided and logged; None is transformers' own choice.

    Args:
        wanted: as in configs.yaml.
        config: of the base.
        length: most tokens of a row.
        compiled: whether decoder layers are compiled, so that lengths are few.

    Raises:
        InputError: the implementation would be wrong for this base, fall back to a slow one, or fail in
            training.
    """
    has_softcap = bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))
    lacks_flash = _what_flash_lacks(device, dtype, packing)
    refusal = {
        # some versions of transformers silently omit the soft-cap
        "sdpa": "drops this model's soft-cap" if has_softcap else None,
        "flex_attention": f"has no backward pass on {device.type}" if device.type != "cuda" else None,
        "flash_attention_2": lacks_flash,
    }.get(wanted)
    if refusal:
        raise InputError(f"key 'attn_implementation' is {wanted}, which {refusal}; set it to auto")
    is_long = length >= LONG
    if wanted != "auto":
        chosen, because = wanted, "as asked for"
    elif not has_softcap:
        chosen, because = None, "the base has no soft-cap on its scores"
    elif device.type != "cuda":
        chosen, because = "eager", f"no other has the base's soft-cap and a backward pass on {device.type}"
    elif not is_long:
        chosen, because = "eager", f"rows of up to {length} tokens, and below {LONG} it is the fastest"
    elif not lacks_flash:
        chosen, because = "flash_attention_2", f"rows of up to {length} tokens"
    elif compiled:
        chosen, because = "flex_attention", f"rows of up to {length} tokens; flash_attention_2 {lacks_flash}"
    else:
        chosen, because = (
            "eager",
            "slow and large with rows as long as these; the others need compiled layers",
        )
        logger.warning(
            "attention: rows of up to %d tokens need compile, and it is off or undecided by auto", length
        )
    logger.info("attention: %s (%s)", chosen or "transformers' choice", because)
    return chosen


def _what_flash_lacks(device: torch.device, dtype: torch.dtype, packing: bool) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if not is_flash_attn_2_available():
        return "needs the package flash-attn, which is not installed"
    if dtype == torch.float32:
        return "needs bf16 or fp16 weights"
    return "would let the samples of a packed row see each other" if packing else None


def attention_masks(
    model: PreTrainedModel, ids_NT: Tensor, sample_NT: Tensor | None = None, *, explicit: bool = False
) -> Any:
    """The masks that the trunk would make for these rows, precomputed.

    Args:
        sample_NT: packed rows: the sample of each token. A token attends only within its own sample.
        explicit: never None. sdpa needs no mask for plain causal attention. Given None, the trunk makes a
            mask only while a stream is captured, so that a captured pass would differ from its warm-up.
    """
    rows_NT1 = torch.empty(
        *ids_NT.shape, 1, dtype=model.dtype, device=ids_NT.device
    )  # only its shape and dtype are used
    apart = None if sample_NT is None else packed_sequence_mask_function(sample_NT)
    masks = create_masks_for_generate(
        model.config, rows_NT1, attention_mask=None, past_key_values=None, and_mask_function=apart
    )
    if masks is None and explicit and sample_NT is None:
        return attention_masks(model, ids_NT, torch.zeros_like(ids_NT))  # the whole row is one sample
    return masks


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Compare two samples in one row with each on its own.

    Raises:
        InputError: the architecture has no positions to give, or takes no masks, so its samples would see
        each other.
    """
    ids_SL = torch.arange(1, 9, device=model.device).view(2, 4)
    sample_1T = torch.arange(2, device=model.device).repeat_interleave(4)[None]
    trunk = model.base_model
    alone_SLD = trunk(input_ids=ids_SL, use_cache=False).last_hidden_state.float()
    masks = attention_masks(model, ids_SL.view(1, 8), sample_1T)
    position_1T = torch.arange(4, device=model.device).repeat(2)[None]
    try:
        together = trunk(
            input_ids=ids_SL.view(1, 8), attention_mask=masks, position_ids=position_1T, use_cache=False
        )
        difference = float((together.last_hidden_state.float().view_as(alone_SLD) - alone_SLD).abs().max())
    except (
        TypeError,
        ValueError,
        LookupError,
    ):  # the error for unsupported masks depends on the version
        difference = float("nan")
    if not difference <= (1e-4 if model.dtype == torch.float32 else 5e-2) * float(alone_SLD.abs().max()):
        raise InputError(
            f"key 'packing': {type(model).__name__} does not keep a row's samples apart; set it to false"
        )
