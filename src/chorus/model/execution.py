"""How passes are carried out: recomputed, in groups, compiled, recorded. It changes no result, beyond rounding."""

import logging
from dataclasses import dataclass
from math import ceil

import torch

from chorus.config import Config
from chorus.data.packing import MAX_SHAPES
from chorus.errors import InputError
from chorus.model.kernels.cuda_graphs import MAX_CAPTURES
from chorus.model.kernels.decoder_layers import Recompute

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Execution:
    """What is decided for a run.

    Attributes:
        recompute: what of each decoder layer's activations is made again in backward.
        agents_per_pass: fused mode's groups; None takes all agents together.
        compiled: torch.compile the decoder layers; a word is the name of another backend than inductor.
        recorded: replay a training pass as a CUDA graph. Not with dropout on activations, whose draws a recording
            would repeat.
    """

    recompute: Recompute = "none"
    agents_per_pass: int | None = None
    compiled: bool | str = False
    captured: bool = False


PLAIN = Execution()


def decide_execution(config: Config, device: torch.device, base_in_shards: bool = False) -> Execution:
    """What a configuration asks for, with `auto` decided and said in the log.

    Raises:
        InputError: graphs without a GPU; compilation, graphs or selective recomputation of a base in shards.
    """
    for key, wanted in (("compile", config.compile), ("cuda_graphs", config.cuda_graphs)):
        if base_in_shards and wanted is True:
            raise InputError(f"key {key!r} is true, which ZeRO stage 3 does not allow; set it to auto, or use stage 2")
    if base_in_shards and config.recomputation == "selective":
        raise InputError("gradient checkpointing is selective, which ZeRO stage 3 does not allow; set it to full")
    if config.cuda_graphs is True and device.type != "cuda":
        raise InputError(f"key 'cuda_graphs' is true, which needs a CUDA GPU, and this is {device}; set it to auto")
    shapes = ceil(config.max_seq_length / config.pad_to_multiple_of)
    if config.packing:
        shapes = MAX_SHAPES
    because = ""
    if device.type != "cuda":
        because = f"; auto: no GPU ({device})"
    elif base_in_shards:
        because = "; auto: ZeRO stage 3 fetches weights inside of a pass"
    elif config.lora_dropout > 0:
        because = "; auto: lora_dropout is above 0"
    elif shapes > MAX_CAPTURES:
        fewer = ceil(config.max_seq_length / MAX_CAPTURES)
        because = f"; auto: batches of up to {shapes} lengths; pad_to_multiple_of {fewer} would do"
    compiled, captured = (not because if key == "auto" else key for key in (config.compile, config.cuda_graphs))
    logger.info("layers compiled: %s; passes recorded: %s%s", compiled, captured, because)
    return Execution(config.recomputation, config.agents_per_pass, compiled, captured)
