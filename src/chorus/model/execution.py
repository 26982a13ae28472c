"""How passes are executed: recomputed, in groups, compiled, captured. No result changes, beyond rounding."""

import logging
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

import torch

from chorus.config import Config
from chorus.data.shapes import MAX_SHAPES
from chorus.errors import InputError
from chorus.model.kernels.cuda_graphs import MAX_CAPTURES
from chorus.model.kernels.decoder_layers import Recompute
from chorus.model.quantisation import QUANTISING

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Execution:
    """What is decided for a run.

    Attributes:
        recompute: what of each decoder layer's activations is recomputed in backward.
        agents_per_pass: fused mode's groups; None takes all agents together.
        compiled: torch.compile the decoder layers; a string names a backend other than inductor.
        captured: replay a training pass as a CUDA graph. Not with dropout on activations, whose draws a
            replay would repeat.
        may_fall_back: a layer or pass that cannot be compiled or captured runs without, with a warning
            instead of an error.
    """

    recompute: Recompute = "none"
    agents_per_pass: int | None = None
    compiled: bool | str = False
    captured: bool = False
    may_fall_back: bool = False


PLAIN = Execution()


def with_padding(config: C, device: torch.device, base_in_shards: bool = False) -> C:
    """The configuration with a number for `pad_to_multiple_of`, which `decide_execution` logs.

    Without it a plain run's batches come in any length, and nothing is compiled or captured. An eighth of the
    longest row costs a batch half of that in padding, on average, and a GPU gains more by the fast path.
    """
    if config.pad_to_multiple_of != "auto":
        return config
    is_fast = device.type == "cuda" and not (config.packs or config.drops_inputs or base_in_shards)
    multiple = 1
    if is_fast and (config.compile is not False or config.cuda_graphs is not False):
        multiple = min(config.max_seq_length, 8 * ceil(config.max_seq_length / (8 * MAX_CAPTURES)))
    return config.model_copy(update={"pad_to_multiple_of": multiple})


def decide_execution(config: Config, device: torch.device, base_in_shards: bool = False) -> Execution:
    """The execution that a configuration asks for, with `auto` decided and logged.

    Raises:
        InputError: graphs without a GPU; compilation, graphs or selective recomputation of a base in shards.
    """
    for key, wanted in (("compile", config.compile), ("cuda_graphs", config.cuda_graphs)):
        if base_in_shards and wanted is True:
            raise InputError(
                f"key {key!r} is true, which ZeRO stage 3 does not allow; set it to auto, or use stage 2"
            )
    for key in QUANTISING:
        if base_in_shards and getattr(config, key):
            raise InputError(
                f"key {key!r} is true, and ZeRO stage 3 cannot cut up a quantised base; set it to false, or "
                "use stage 2"
            )
    if base_in_shards and config.recomputation == "selective":
        raise InputError(
            "key 'gradient_checkpointing' is selective, which ZeRO stage 3 does not allow; set it to full"
        )
    if config.cuda_graphs is True and device.type != "cuda":
        raise InputError(
            f"key 'cuda_graphs' is true, which needs a CUDA GPU, and this is {device}; set it to auto"
        )
    shapes = ceil(config.max_seq_length / config.padding)
    if config.packs:
        shapes = MAX_SHAPES
    because = ""
    if device.type != "cuda":
        because = f"; auto: no GPU ({device})"
    elif base_in_shards:
        because = "; auto: ZeRO stage 3 fetches weights inside of a pass"
    elif config.drops_inputs:
        because = "; auto: lora_dropout is above 0"
    elif shapes > MAX_CAPTURES:
        fewer = ceil(config.max_seq_length / MAX_CAPTURES)
        because = f"; auto: batches of up to {shapes} lengths; pad_to_multiple_of {fewer} would do"
    compiled, captured = (
        not because if key == "auto" else key for key in (config.compile, config.cuda_graphs)
    )
    rows = "packed" if config.packs else f"padded to a multiple of {config.padding}"
    logger.info("layers compiled: %s; passes captured: %s; rows %s%s", compiled, captured, rows, because)
    may_fall_back = "auto" in (config.compile, config.cuda_graphs)
    return Execution(config.recomputation, config.agents_per_pass, compiled, captured, may_fall_back)
