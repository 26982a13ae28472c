"""ZeRO over the data group alone, where agents are spread over processes.

DeepSpeed calls processes with different parameters a model-parallel group, and learns the groups from an
`mpu`, Megatron-LM's interface. With it DeepSpeed itself shards and reduces over the data group, and computes
the norm for clipping over all agents, so no further reduction is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import nn
from torch.distributed import ProcessGroup

from chorus.mesh import Mesh


class Mpu:
    """What DeepSpeed asks of an `mpu`."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_data_parallel_group(self) -> ProcessGroup | None:
        return self.mesh.data_group

    def get_data_parallel_group_ranks(self) -> Sequence[int]:
        return self.mesh.data_ranks

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data_index

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.data_size

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self.mesh.agent_group

    def get_model_parallel_rank(self) -> int:
        return self.mesh.agent_index

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.agent_size


@contextmanager
def data_group_of(mesh: Mesh, adapters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The context in which Accelerate starts DeepSpeed over this mesh: Accelerate has no argument for an
    `mpu`.

    Args:
        adapters: of this process's agents. They are marked as model-parallel: unmarked parameters count in
            DeepSpeed's norm only on the first process of the agent group.
    """
    if mesh.agent_size == 1:
        yield
        return
    import deepspeed  # takes seconds: imported only when needed

    for adapter_F in adapters:
        cast(Any, adapter_F).model_parallel = True
    initialize = deepspeed.initialize
    deepspeed.initialize = partial(initialize, mpu=Mpu(mesh))
    try:
        yield
    finally:
        deepspeed.initialize = initialize
