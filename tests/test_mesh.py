"""Agents spread over processes: the same run as in one process, whatever the mesh and the engine."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from launching import PLAIN, ddp, launch, train
from mesh_worker import BROKEN, RUNS, STEPS, Case, Done, K, run
from preloaded import forked
from toy import max_difference

from chorus.errors import InputError
from chorus.mesh import Mesh, decide_agent_size, refuse_spread_agents
from chorus.training.state import MOMENTS, TrainingState

ROUNDING = 2e-4  # of a weight: AdamW divides by gradients near zero. A step that is left out moves 1e-2.

alone = cache(run)


@pytest.mark.parametrize(
    ("wanted", "agents", "processes", "size"),
    [
        (1, 3, 7, 1),
        (2, 4, 8, 2),
        ("auto", 4, 8, 4),
        ("auto", 6, 4, 2),
        ("auto", 3, 8, 1),
        ("auto", "auto", 96, 48),
    ],
)
def test_auto_spreads_the_agents_as_far_as_they_and_the_processes_divide(wanted, agents, processes, size):
    assert decide_agent_size(wanted, agents, processes) == size


@pytest.mark.parametrize(
    ("wanted", "agents", "processes", "words"),
    [
        (3, 4, 6, "is 3, which does not divide num_agents, 4; set it to 1 or 2, or to auto"),
        (4, 8, 6, "is 4, which does not divide the number of processes, 6; set it to 1 or 2, or to auto"),
    ],
)
def test_agents_that_cannot_be_spread_evenly_are_refused_with_what_can(wanted, agents, processes, words):
    with pytest.raises(InputError, match=f"key 'agent_parallel_size' {words}"):
        decide_agent_size(wanted, agents, processes)


def test_fp16_and_zero_stage_3_do_not_go_with_agents_over_processes():
    for precision, stage, word in (("fp16", 2, "fp16"), ("no", 3, "stage 3")):
        refuse_spread_agents(1, precision, stage)
        with pytest.raises(InputError, match=f"'agent_parallel_size' comes to 2, which .*{word}"):
            refuse_spread_agents(2, precision, stage)


def test_the_agents_of_all_processes_in_order_are_all_agents_and_neighbours_share_theirs():
    meshes = [Mesh(2, 3, rank // 3, rank % 3) for rank in range(6)]
    assert [mesh.held_agents(4) for mesh in meshes] == [(0, 1)] * 3 + [(2, 3)] * 3
    assert [list(mesh.data_ranks) for mesh in meshes] == [[0, 1, 2]] * 3 + [[3, 4, 5]] * 3


@pytest.mark.launch
@pytest.mark.parametrize("which", ["2", "4", pytest.param("4, the rest", marks=pytest.mark.slow)])
def test_agents_over_processes_have_the_losses_and_weights_of_one_process(which: str, tmp_path: Path):
    """In every mode, under DDP and ZeRO-2, with accumulation, packing, recomputation, DropConnect, clipping,
    values of each agent's own, lambda's schedule, predicted distributions compared, rows shared by
    responsibilities, bootstrap weights, batches of each agent's own and a loss that is not finite; also
    resumed with another mesh and engine than it was saved with."""
    command = [*ddp(int(which[0]))[:-1], "tests/helpers/mesh_worker.py"]
    result = forked(command, str(tmp_path), which)
    assert result.returncode == 0, result.stderr[-3000:]
    of_runs = torch.load(tmp_path / "runs.pt", weights_only=False)
    of_runs = {key: Done(*done) for key, done in of_runs.items()}
    assert of_runs.keys() >= set(RUNS[which])
    for how, done in of_runs.items():
        case, start = how[0], how[3] if len(how) > 3 else 0
        assert_same_run(done, alone(case), case, start, str(how))
        if start:
            saved = of_runs[how[:3]].states[start]
            assert difference(done.states[start], saved) == 0, how
            assert done.states[start].optimizer_step == saved.optimizer_step


SHORT = (
    *("num_agents=2", "batch_size=4", "debug_subset_size=24", "max_train_steps=4", "logging_steps=1"),
    *("save_steps=2", "eval_samples=4", "max_new_tokens_eval=6", "mixed_precision=no", "lora_rank=2"),
    "lambda_sw=0.01",
)


@pytest.mark.launch
@pytest.mark.parametrize("start", [forked, pytest.param(launch, marks=pytest.mark.slow)])
def test_a_run_of_agents_over_two_processes_is_scored_saved_and_resumed_as_that_of_one(start, tmp_path: Path):
    """Of train.py as it is: its evaluation, its files, and a checkpoint that the other kind resumes."""
    spread = [*SHORT, "agent_parallel_size=2"]  # the same rows, as both see all
    two = train(ddp(2), tmp_path / "two", *spread, run=start)
    one = train(PLAIN, tmp_path / "one", *SHORT, run=start)
    for ours, theirs in zip(two, one, strict=True):
        assert ours["task_loss_per_agent"] == pytest.approx(theirs["task_loss_per_agent"], rel=1e-4)
        assert ours["swd"] == pytest.approx(theirs["swd"], rel=1e-3, abs=1e-7)
    scores = [
        json.loads((tmp_path / name / "ensemble.json").read_text())["evaluation"]["after"]["scores"]
        for name in ("two", "one")
    ]
    for name, own in scores[1].items():
        assert scores[0][name]["token/NLL"] == pytest.approx(own["token/NLL"], rel=1e-3), name
    assert "agents over 2 processes: 0 on this one" in (tmp_path / "two" / "train.log").read_text()
    for origin, command, settings in (("two", PLAIN, SHORT), ("one", ddp(2), spread)):
        shutil.copytree(tmp_path / origin, tmp_path / "resumed")
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_000004")
        resumed = train(command, tmp_path / "resumed", *settings, "eval_samples=0", run=start)
        assert [row["step"] for row in resumed] == [1, 2, 3, 4]
        for ours, theirs in zip(resumed, one, strict=True):
            assert ours["task_loss_per_agent"] == pytest.approx(theirs["task_loss_per_agent"], rel=1e-4)
        shutil.rmtree(tmp_path / "resumed")


def assert_same_run(ours: Done, theirs: Done, case: Case, start: int, how: str) -> None:
    assert list(ours.rows) == list(range(start + 1, STEPS + 1))
    for step, row in ours.rows.items():
        for name in (
            "loss",
            "task_loss",
            "swd",
            "lambda_sw",
            "task_loss_per_agent",
            "grad_norm",
            "lr",
            "skipped",
        ):
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
