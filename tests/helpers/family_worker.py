"""One of two DDP processes on a family's tiny model, each with
half of the rows: `family_worker.py FAMILY FOLDER`."""

import sys
from pathlib import Path

import torch
from families import agents_of
from torch.distributed import get_rank, init_process_group
from torch.nn.parallel import DistributedDataParallel
from toy import toy_batch

from chorus.data.batches import Batch


def main(family: str, folder: Path) -> None:
    init_process_group("gloo")
    agents, whole = agents_of(family), toy_batch(without_targets=None)
    rows = slice(2 * get_rank(), 2 * get_rank() + 2)
    mask_BT = whole.mask_BT[rows]
    parts = (whole.input_BT[rows], whole.target_BT[rows], mask_BT, mask_BT.flatten().nonzero().squeeze(1))
    batch = Batch(*parts, whole.points_SM[:2])
    module = DistributedDataParallel(agents)
    for name in ("first", "second"):
        agents.zero_grad()
        loss = module(batch, step=0).nll_KBT.sum() / len(whole.target_rows_N)
        (2 * loss).backward()  # DDP takes the mean over processes
        if get_rank() == 0:
            torch.save(
                {agent: adapter_F.grad for agent, adapter_F in agents.adapters().items()},
                folder / f"{name}.pt",
            )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
