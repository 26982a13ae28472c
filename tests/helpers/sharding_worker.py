"""One of two ZeRO-3 processes, run by test_sharding.py: gradients in every mode, a state that is put in and
read back.

It writes gradients and the state after a step into the folder named.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any, get_args

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from toy import toy_agents, toy_batch

from chorus.checkpoint.store import read_tensors
from chorus.config import Config
from chorus.errors import input_errors_end_the_program
from chorus.model.agents import Agents, Mode
from chorus.training.engine import make_accelerator, start_engine
from chorus.training.state import MOMENTS, read_state, restore_state
from chorus.training.zero import stage3
from chorus.training.zero.deepspeed_json import deepspeed_json

JSON = "recipes/deepspeed/zero3.json"
PERSISTENCE = "stage3_param_persistence_threshold"


def share_held(agents: Agents) -> float:
    """Of the base's elements, those that lie whole on this process, beside the shards."""
    frozen: list[Any] = [tensor for tensor in agents.parameters() if not tensor.requires_grad]
    return sum(tensor.numel() for tensor in frozen) / sum(tensor.ds_numel for tensor in frozen)


def main(folder: Path) -> None:
    own = {"use_deepspeed": True, "deepspeed_config_file": JSON, "output_dir": str(folder)}
    config = Config(batch_size=4, lambda_sw=0.0, max_grad_norm=0.0, lr=0.01, **own)
    accelerator = make_accelerator(config, config)
    is_first = accelerator.is_main_process
    for mode, checkpointing in product(get_args(Mode), ("none", "full")):
        agents = toy_agents(mode, gradient_checkpointing=checkpointing, dropconnect_p=0.4)
        adapters = list(agents.adapters().values())
        settings = deepspeed_json(config, config, "no", num_processes=2)
        settings["zero_optimization"][PERSISTENCE] = (
            10 * agents.config.hidden_size
        )  # as Accelerate reads "auto"
        engine, *_ = deepspeed.initialize(
            model=agents, optimizer=torch.optim.AdamW(adapters), config=settings
        )
        stage3.register_reads(agents)
        stage3.keep_gathered(engine.optimizer, adapters)
        with stage3.unsharded(engine, adapters):
            assert share_held(agents) == 1
        for _ in range(
            2
        ):  # DeepSpeed learns the order of the layers in the first pass and fetches ahead in the next
            engine.backward(engine(toy_batch(), step=3, slot=1).nll_KBT.sum())
        assert share_held(agents) < 0.05, "more than its norms"
        flat = {agent: safe_get_full_grad(adapter_F) for agent, adapter_F in agents.adapters().items()}
        gradients = {json.dumps(identity): gradient for identity, gradient in agents.named(flat).items()}
        if is_first:
            torch.save(gradients, folder / f"{mode}-{checkpointing}.pt")

    engine = start_engine(accelerator, toy_agents("sequential", trained=False), config)
    assert "ZeRO-3 is active" in engine.description
    put_in = read_tensors(folder, 5)
    restore_state(engine, put_in)
    state = read_state(engine)
    assert state.optimizer_step == 5
    for before, after in (
        (put_in.weights, state.weights),
        *((put_in.moments[m], state.moments[m]) for m in MOMENTS),
    ):
        assert all(torch.equal(tensor, after[identity]) for identity, tensor in before.items())
    with engine.micro_batch(is_last=True):
        engine.backward(engine.module(toy_batch(), step=0).nll_KBT.mean() / 2)
    engine.step(config.lr)
    weights = {json.dumps(identity): tensor for identity, tensor in read_state(engine).weights.items()}
    live = {json.dumps(identity): tensor for identity, tensor in engine.agents.adapter_tensors().items()}
    assert all(torch.equal(tensor, live[name]) for name, tensor in weights.items())
    if is_first:
        torch.save(weights, folder / "after.pt")
    accelerator.wait_for_everyone()
    engine.close()


if __name__ == "__main__":
    with input_errors_end_the_program():
        main(Path(sys.argv[1]))
