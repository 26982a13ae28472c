"""Bytes that each process sends in an optimiser step.

Collective calls are counted as ring algorithms send (Patarasuk & Yuan 2009): all-gather and reduce-scatter
of n bytes over p processes send n (p - 1) / p each, an all-reduce twice that. Norms, a number for each agent,
are left out.
"""

from typing import NamedTuple

from chorus.mesh import Mesh


class Traffic(NamedTuple):
    """Bytes sent by one process in one step, to its data group or to its agent group.

    Attributes:
        gradients: summed over the data group: in fp32 by DDP, in the run's precision by ZeRO.
        weights: gathered over the data group after the step, by ZeRO alone.
        points: projections of its agents' points, to processes with other rows: for the sliced distance.
        sorted_points: projections of all rows of the data group, to processes with other agents.
    """

    gradients: int
    weights: int
    points: int
    sorted_points: int

    @property
    def of_data_group(self) -> int:
        return self.gradients + self.weights + self.points

    @property
    def total(self) -> int:
        return self.of_data_group + self.sorted_points


def traffic(
    mesh: Mesh,
    *,
    agents: int,
    adapter: int,
    zero_stage: int = 0,
    itemsize: int = 4,
    micro_batches: int = 1,
    points: int = 0,
    projections: int = 0,
) -> Traffic:
    """What a process sends.

    Args:
        agents: K, of the run.
        adapter: trained numbers of one agent.
        zero_stage: 0 is DDP. From stage 2 on, gradients are summed in every micro-batch.
        itemsize: bytes of a number in the run's precision, which ZeRO sends.
        micro_batches: of an optimiser step.
        points: of the cloud of one agent on one process; 0 without the distance.
        projections: of a point, in fp32.
    """
    held = agents // mesh.agent_size
    D, A = mesh.data_size, mesh.agent_size
    elements = held * adapter
    all_reduced = 2 * elements * (D - 1) // D
    projected = 4 * held * points * projections * micro_batches
    return Traffic(
        gradients=all_reduced * (itemsize * (micro_batches if zero_stage >= 2 else 1) if zero_stage else 4),
        weights=itemsize * elements * (D - 1) // D if zero_stage else 0,
        points=projected * (D - 1),
        sorted_points=projected * D * (A - 1),
    )
