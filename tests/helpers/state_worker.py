"""One of two ZeRO-2 processes: restores a plain checkpoint,
reads the state back, steps, and writes it as its own."""

import sys
from pathlib import Path

import torch
from toy import toy_agents, toy_batch

from chorus.checkpoint.store import Checkpointer, read_tensors, verify, write_checkpoint
from chorus.collectives import on_first_process
from chorus.config import Config
from chorus.errors import input_errors_end_the_program
from chorus.training.engine import make_accelerator, start_engine
from chorus.training.state import read_state, restore_state


def main(folder: Path) -> None:
    config = Config(batch_size=4, lambda_sw=0.0, num_agents=3, output_dir=str(folder))
    accelerator = make_accelerator(config, config)
    engine = start_engine(accelerator, toy_agents("sequential", trained=False), config)
    plain = folder / "checkpoints" / "step_000003"
    restore_state(engine, read_tensors(plain, verify(plain).optimizer_step))
    state = read_state(engine)
    for (
        identity,
        live,
    ) in engine.agents.adapter_tensors().items():  # beside the masters: what the next pass sees
        assert torch.equal(live, state.weights[identity]), identity
    facts = {"format": 1, "step": 4, "optimizer_step": state.optimizer_step}
    on_first_process(accelerator, lambda: write_checkpoint(folder, state, facts, config))
    assert accelerator.num_processes == 2
    with engine.micro_batch(is_last=True):
        engine.backward(engine.module(toy_batch(), step=0).nll_KBT.mean() / 2)
    engine.step(config.lr)
    Checkpointer(folder, config, {}).save(engine, step=5, epoch=0, skips_in_a_row=0)
    engine.close()


if __name__ == "__main__":
    with input_errors_end_the_program():
        main(Path(sys.argv[1]))
