"""One of two ZeRO-2 processes: the gradients of half the rows in every mode, read from DeepSpeed's engine.

Run by test_agents.py under torch's launcher; writes one file of gradients for each combination into the folder named.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import get_args

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch import distributed
from toy import toy_agents, toy_batch

from chorus.agents import Mode
from chorus.config import Config
from chorus.data import Batch
from chorus.deepspeed_config import deepspeed_json
from chorus.layers import Recompute
from chorus.objective import SwdSettings, objective


def gather(own: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(own) for _ in range(2)]
    distributed.all_gather(parts, own.detach())
    parts[distributed.get_rank()] = own
    return torch.cat(parts)


def main(folder: Path) -> None:
    deepspeed.init_distributed(dist_backend="gloo")
    rank = distributed.get_rank()
    whole = toy_batch(without_targets=None)
    B = len(whole.input_BT)
    rows = slice(rank * B // 2, (rank + 1) * B // 2)
    input_BT, target_BT, mask_BT, points_BM = (tensor[rows] for tensor in (*whole[:3], whole.points_BM))
    batch = Batch(input_BT, target_BT, mask_BT, mask_BT.flatten().nonzero().squeeze(1), points_BM)
    # No clipping: the norm of all agents would come between an agent and its own gradient.
    settings = deepspeed_json(Config(max_grad_norm=0.0, batch_size=B // 2), "no", num_processes=2)
    for mode, checkpointing, dropconnect_p in product(get_args(Mode), get_args(Recompute), (0.0, 0.4)):
        agents = toy_agents(mode, gradient_checkpointing=checkpointing, dropconnect_p=dropconnect_p)
        optimizer = torch.optim.AdamW(agents.adapter_tensors().values())
        engine, *_ = deepspeed.initialize(model=agents, optimizer=optimizer, config=settings)
        part = objective(
            *engine(batch, step=3, slot=1),
            batch,
            num_targets=len(whole.target_rows_N),
            num_micro_batches=1,
            lambda_sw=0.5,
            swd=SwdSettings(5, "tokens", 0),
            step=3,
            rows_per_process=B // 2,
            gather=gather,
        )
        engine.backward(part.share * 2)  # ZeRO averages over the two
        gradients = {
            json.dumps(identity): safe_get_full_grad(tensor) for identity, tensor in agents.adapter_tensors().items()
        }
        if rank == 0:
            torch.save(gradients, folder / f"{mode}-{checkpointing}-{dropconnect_p}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
