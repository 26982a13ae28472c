"""One optimiser step whose rows are spread over micro-batches and processes.

Run by test_engine.py as one of two processes; the first one writes AdamW's first moments and the gradient
norm.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from toy import toy_agents, toy_samples

from chorus.config import Config
from chorus.data.batches import collate
from chorus.errors import input_errors_end_the_program
from chorus.training.engine import Engine, make_accelerator, start_engine
from chorus.training.state import read_state

NUM_ROWS, MICRO_BATCHES, PROCESSES = 12, 3, 2
MAX_GRAD_NORM = 1.0  # a third of the norm


def step_over(engine: Engine, micro_batches: int) -> tuple[dict[str, Tensor], float]:
    """The first moments, which are a tenth of the step's gradient (AdamW's first step itself hides its
    scale), and the gradient norm."""
    samples = toy_samples(NUM_ROWS)
    num_targets = sum(sample.num_targets for sample in samples)
    rows = NUM_ROWS // (micro_batches * engine.mesh.data_size)
    for micro_step in range(micro_batches):
        first = (micro_step * engine.mesh.data_size + engine.mesh.data_index) * rows
        batch = collate(samples[first : first + rows], pad_id=0)
        with engine.micro_batch(is_last=micro_step == micro_batches - 1):
            engine.backward(engine.module(batch, step=0).nll_KBT.sum() / num_targets)
    result = engine.step(0.01)
    moments = read_state(engine).moments["exp_avg"]
    return {json.dumps(identity): tensor.clone() for identity, tensor in moments.items()}, float(
        result.grad_norm
    )


def main(folder: Path) -> None:
    rows = NUM_ROWS // (MICRO_BATCHES * PROCESSES)
    config = Config(gradient_accumulation_steps=MICRO_BATCHES, batch_size=rows, max_grad_norm=MAX_GRAD_NORM)
    accelerator = make_accelerator(config, config)
    assert accelerator.num_processes == PROCESSES
    engine = start_engine(accelerator, toy_agents("fused"), config)
    results = step_over(engine, MICRO_BATCHES)
    if accelerator.is_main_process:
        torch.save(results, folder / "step.pt")
    accelerator.wait_for_everyone()
    engine.close()


if __name__ == "__main__":
    with input_errors_end_the_program():
        main(Path(sys.argv[1]))
