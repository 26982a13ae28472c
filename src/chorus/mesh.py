"""The mesh of processes, data x agents: each process's rows, agents and groups for collective calls.

    rank = agent index * data size + data index

Processes with the same data index, an agent group, see the same rows; each holds K / A of the K agents.
Processes with the same agent index, a data group, hold the same agents; their gradients are reduced.
Neighbouring ranks form a data group, because gradients are megabytes and the data of agent groups are
kilobytes: so a data group stays on one host where possible, and only projections are sent between hosts.
"""

from dataclasses import dataclass
from math import gcd

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from chorus.errors import InputError
from chorus.spans import span

MOST_SPREAD = 64  # num_agents auto uses at most so many agents


@dataclass(frozen=True)
class Mesh:
    """The place of this process. `Mesh()` is a process alone.

    Attributes:
        agent_size: A, the processes of an agent group. Each holds K / A agents.
        data_size: the processes of a data group. A micro-batch has data_size x `batch_size` rows.
        agent_index, data_index: the place of this process in its agent group, and in its data group.
        agent_group, data_group: for collective calls; None where A is 1: then a data group is all processes.
    """

    agent_size: int = 1
    data_size: int = 1
    agent_index: int = 0
    data_index: int = 0
    agent_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None

    @property
    def data_ranks(self) -> range:
        """The ranks of this process's data group, in order."""
        return range(self.agent_index * self.data_size, (self.agent_index + 1) * self.data_size)

    def held_agents(self, num_agents: int) -> tuple[int, ...]:
        """The agents that this process holds: consecutive, so that agent groups gather them in order."""
        held = num_agents // self.agent_size
        return tuple(range(self.agent_index * held, (self.agent_index + 1) * held))

    def gather_rows(self, own: Tensor) -> Tensor:
        """Concatenate `own` over the data group along its first axis; a gradient flows to the own slice only.

        This is sufficient: each process contributes its own slice's gradient, and the reduction sums them.
        """
        return _gather(own, self.data_size, self.data_index, self.data_group)

    def gather_agents(self, own: Tensor) -> Tensor:
        """As `gather_rows`, over the agent group: all K agents in order, from each process's own.

        An agent's gradient needs only its own slice, which no other process of the group holds.
        """
        return _gather(own, self.agent_size, self.agent_index, self.agent_group)

    def sum_rows(self, own: Tensor) -> Tensor:
        """The sum of `own` over the data group."""
        if self.data_size == 1:
            return own
        with span("communication"):
            total = own.clone()
            dist.all_reduce(total, group=self.data_group)
        return total


ALONE = Mesh()


def _gather(own: Tensor, size: int, index: int, group: ProcessGroup | None) -> Tensor:
    if size == 1:
        return own
    with span("communication"):
        sent = own.detach().contiguous()
        all_of_them = sent.new_empty(size * len(sent), *sent.shape[1:])
        dist.all_gather_into_tensor(all_of_them, sent, group=group)
    parts = list(all_of_them.chunk(size))
    parts[index] = own
    return torch.cat(parts)


def decide_agent_size(wanted: int | str, num_agents: int | str, num_processes: int) -> int:
    """A, from `agent_parallel_size`. auto: the largest that divides both the processes and the agents.

    The larger A, the fewer gradients are sent. Where `num_agents` is auto too, A is the largest divisor of
    the processes up to `MOST_SPREAD`.

    Raises:
        InputError: A does not divide the agents, or the processes.
    """
    if isinstance(num_agents, int):
        fits = divisors(gcd(num_agents, num_processes))
    else:
        fits = [n for n in divisors(num_processes) if n <= MOST_SPREAD]
    if wanted == "auto":
        return fits[-1]
    size = int(wanted)
    for what, count in (("the number of processes", num_processes), ("num_agents", num_agents)):
        if isinstance(count, int) and count % size:
            raise InputError(
                f"key 'agent_parallel_size' is {size}, which does not divide {what}, {count}; set it to "
                f"{' or '.join(map(str, fits))}, or to auto"
            )
    return size


def refuse_spread_agents(size: int, precision: str, stage: int) -> None:
    """Refuse settings that are incompatible with agents spread over processes.

    Raises:
        InputError: ZeRO stage 3, whose shards of the base are cut for all processes; fp16, whose loss scale
            each process would move by its own agents' overflows.
    """
    if size > 1 and stage == 3:
        raise InputError(
            f"key 'agent_parallel_size' comes to {size}, which ZeRO stage 3 does not allow; set it to 1, or "
            "use stage 2"
        )
    if size > 1 and precision == "fp16":
        raise InputError(
            f"key 'agent_parallel_size' comes to {size}, which mixed_precision fp16 does not allow; set it "
            "to 1, or use bf16"
        )


def divisors(number: int) -> list[int]:
    """All divisors, in order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def make_mesh(accelerator: Accelerator, size: int = 1) -> Mesh:
    """The mesh of all processes with agent groups of `size`. A collective call."""
    count, rank = accelerator.num_processes, accelerator.process_index
    if size == 1:
        return Mesh(data_size=count, data_index=rank)
    axes = init_device_mesh(accelerator.device.type, (size, count // size), mesh_dim_names=("agents", "data"))
    return Mesh(
        agent_size=size,
        data_size=count // size,
        agent_index=rank // (count // size),
        data_index=rank % (count // size),
        agent_group=axes.get_group("agents"),
        data_group=axes.get_group("data"),
    )
