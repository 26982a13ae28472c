"""One of two ZeRO-2 processes: the gradients of half the samples in every mode, read from DeepSpeed's engine.

Run by test_agents.py as under torch's launcher: `deepspeed_worker.py FOLDER sample|all`. It writes a file of
gradients for each combination.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import distributed
from toy import ZERO2_CASES, toy_agents, toy_samples

from chorus.config import Config
from chorus.data.batches import collate
from chorus.training.diversity import SwdSettings
from chorus.training.objective import objective
from chorus.training.zero.deepspeed_json import deepspeed_json
from chorus.training.zero.launcher import look_up_no_operators


def gather(own: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(own) for _ in range(2)]
    distributed.all_gather(parts, own.detach())
    parts[distributed.get_rank()] = own
    return torch.cat(parts)


def main(folder: Path, which: str) -> None:
    look_up_no_operators()  # as the engine does: it would compile for a minute, once on each machine
    deepspeed.init_distributed(dist_backend="gloo")
    rank = distributed.get_rank()
    samples = toy_samples(8)
    own = samples[rank * 4 : rank * 4 + 4]
    # No clipping: the norm of all agents would come between an agent and its own gradient.
    config = Config(max_grad_norm=0.0, batch_size=4)
    settings = deepspeed_json(config, config, "no", num_processes=2)
    for mode, checkpointing, dropconnect_p, packing in ZERO2_CASES[which]:
        batch = collate(own, 0, points_per_row=3, packing=20 if packing else None)
        agents = toy_agents(mode, gradient_checkpointing=checkpointing, dropconnect_p=dropconnect_p)
        # Half of the cases with buckets smaller than an adapter, as the usual ones are for gemma-2-9b.
        settings["zero_optimization"]["reduce_bucket_size"] = 1000 if dropconnect_p else 50_000_000
        optimizer = torch.optim.AdamW(agents.adapters().values())
        engine, *_ = deepspeed.initialize(model=agents, optimizer=optimizer, config=settings)
        part = objective(
            *engine(batch, step=3, slot=1),
            batch,
            num_targets=sum(sample.num_targets for sample in samples),
            num_micro_batches=1,
            lambda_sw=0.5,
            swd=SwdSettings(5, "tokens", 0),
            step=3,
            rows_per_process=4,
            gather=gather,
        )
        engine.backward(part.share * 2)  # ZeRO averages over the two
        flat = {agent: safe_get_full_grad(adapter_F) for agent, adapter_F in agents.adapters().items()}
        gradients = {json.dumps(identity): gradient for identity, gradient in agents.named(flat).items()}
        if rank == 0:
            torch.save(gradients, folder / f"{mode}-{checkpointing}-{dropconnect_p}-{packing}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
