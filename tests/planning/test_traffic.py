"""What each process sends in a step, against closed forms."""

import pytest

from chorus.mesh import Mesh
from chorus.planning.traffic import Traffic, traffic


def test_ddp_sends_its_agents_gradients_twice_but_for_its_own_part():
    """A ring all-reduce over 4 processes: 2 x 3/4 of the bytes."""
    assert traffic(Mesh(1, 4), agents=8, adapter=100) == Traffic(2 * 3 * 8 * 100 * 4 // 4, 0, 0, 0)


def test_agents_over_all_processes_send_sorted_projections_alone():
    sent = traffic(Mesh(4, 1), agents=8, adapter=100, points=6, projections=5)
    assert sent == Traffic(0, 0, 0, 3 * (2 * 6 * 5 * 4))  # two agents' of a process, to three others
    assert sent.total == sent.sorted_points


def test_zero2_sends_gradients_of_every_micro_batch_and_the_weights_of_a_step():
    mesh = Mesh(2, 2)
    sent = traffic(mesh, agents=4, adapter=100, zero_stage=2, itemsize=2, micro_batches=3)
    own = 2 * 100 * 2  # bytes of its two agents, of which the half is another process's
    assert (sent.gradients, sent.weights) == (3 * own, own // 2)
    assert traffic(mesh, agents=4, adapter=100, zero_stage=1, itemsize=2, micro_batches=3).gradients == own


@pytest.mark.parametrize("A", [1, 2, 4, 8])
def test_whatever_the_mesh_a_process_sends_what_the_others_lack_of_its_projections(A: int):
    """8 agents, 8 processes, 6 points of an agent on a process at A = 1, else A times as many."""
    sent = traffic(Mesh(A, 8 // A), agents=8, adapter=1, points=6 * A, projections=5)
    of_an_agent, held, D = 8 * 6 * 5 * 4, 8 // A, 8 // A  # bytes of an agent's projections of all rows
    assert sent.points == held * of_an_agent * (D - 1) // D
    assert sent.sorted_points == (8 - held) * of_an_agent
