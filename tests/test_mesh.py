"""Agents spread over processes: the same run as in one process, whatever the mesh and the engine."""

from functools import cache
from pathlib import Path

import pytest
import torch
from launching import ddp
from mesh_worker import BROKEN, RUNS, STEPS, Case, Done, K, run
from preloaded import forked
from toy import max_difference

from chorus.training.state import MOMENTS, TrainingState

ROUNDING = 2e-4  # of a weight: AdamW divides by gradients near zero. A step that is left out moves 1e-2.

alone = cache(run)


@pytest.mark.launch
@pytest.mark.parametrize("num_processes", [2, 4])
def test_agents_over_processes_have_the_losses_and_weights_of_one_process(num_processes: int, tmp_path: Path):
    """In every mode, under DDP and ZeRO-2, with accumulation, packing, recomputation, DropConnect, clipping
    and a loss that is not finite; also resumed with another mesh and engine than it was saved with."""
    command = [*ddp(num_processes)[:-1], "tests/helpers/mesh_worker.py"]
    result = forked(command, str(tmp_path), str(num_processes))
    assert result.returncode == 0, result.stderr[-3000:]
    of_runs = torch.load(tmp_path / "runs.pt", weights_only=False)
    of_runs = {key: Done(*done) for key, done in of_runs.items()}
    assert of_runs.keys() >= set(RUNS[num_processes])
    for how, done in of_runs.items():
        case, start = how[0], how[3] if len(how) > 3 else 0
        assert_same_run(done, alone(case), case, start, str(how))
        if start:
            saved = of_runs[how[:3]].states[start]
            assert difference(done.states[start], saved) == 0, how
            assert done.states[start].optimizer_step == saved.optimizer_step


def assert_same_run(ours: Done, theirs: Done, case: Case, start: int, how: str) -> None:
    assert list(ours.rows) == list(range(start + 1, STEPS + 1))
    for step, row in ours.rows.items():
        for name in ("loss", "task_loss", "swd", "task_loss_per_agent", "grad_norm", "lr", "skipped"):
            wanted = theirs.rows[step][name]
            if wanted is not None:
                wanted = pytest.approx(wanted, rel=2e-5, abs=1e-8, nan_ok=True)
            assert row[name] == wanted, (how, step, name)
    our_state, their_state = ours.states[STEPS], theirs.states[STEPS]
    assert our_state.optimizer_step == their_state.optimizer_step
    assert list(our_state.weights) == list(their_state.weights), how
    assert difference(our_state, their_state) < ROUNDING, how
    for identity, moment in their_state.moments[MOMENTS[0]].items():
        assert max_difference(our_state.moments[MOMENTS[0]][identity], moment) < 1e-3, (how, identity)
    assert torch.allclose(ours.nll_KB, theirs.nll_KB, rtol=1e-3), how
    expected = [STEPS - (k == BROKEN) for k in range(K)] if case.is_broken else STEPS
    assert our_state.optimizer_step == expected, how
    if case.max_grad_norm:
        assert min(row["grad_norm"] for row in ours.rows.values()) > case.max_grad_norm, "nothing was clipped"


def difference(one: TrainingState, other: TrainingState) -> float:
    return max(float((one.weights[key] - other.weights[key]).abs().max()) for key in other.weights)
