"""train.py on a GPU whose memory is full from a moment on: `memory_worker.py MOMENT settings`.

MOMENT: training, the fifth backward pass; evaluation, its start; generation, the first written answer;
compiling, the first pass through a layer; capture, just before it.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import train
from chorus.collectives import lost_processes_named
from chorus.config import load_config
from chorus.ensemble import evaluate as evaluate_module
from chorus.errors import input_errors_end_the_program
from chorus.model.kernels import cuda_graphs, decoder_layers
from chorus.monitoring import evaluation
from chorus.planning.memory_check import memory_errors_named
from chorus.training.engine import Engine

BALLAST = []


def fill() -> None:
    """Let the allocator ask the device for no more, and take what it holds free."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    for power in range(30, 8, -1):
        try:
            while True:
                BALLAST.append(torch.empty(2**power, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            continue


def after_filling(call: Callable, number: int = 1) -> Callable:
    """`call`, the `number`-th time with a full memory."""
    calls = itertools.count(1)

    def filled(*arguments: Any, **more: Any) -> Any:
        if next(calls) == number:
            fill()
        return call(*arguments, **more)

    return filled


def arrange(moment: str) -> None:
    match moment:
        case "training":
            Engine.backward = after_filling(Engine.backward, 5)
        case "evaluation":
            evaluation.evaluate = after_filling(evaluation.evaluate)
        case "generation":
            evaluate_module.text_outcomes = after_filling(evaluate_module.text_outcomes)
        case "compiling":
            decoder_layers._run = after_filling(decoder_layers._run)
        case "capture":  # two graphs are made before the first capture
            cuda_graphs.torch.cuda.CUDAGraph = after_filling(torch.cuda.CUDAGraph)


if __name__ == "__main__":
    moment, *settings = sys.argv[1:]
    with input_errors_end_the_program():
        config = load_config(settings)
        arrange(moment)
        with lost_processes_named(config.collective_timeout_s), memory_errors_named(config):
            train.main(config)
