"""Runs that are killed and stopped, through the real launchers:
a sample of what `make soak` does at length."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import preloaded
import pytest
import soak
from launching import HELPERS, ddp, wait_for
from lives import PATIENCE_S, Life, Pace, Plan, Run, Strike, processes_of, start, worker_of
from preloaded import Workers, environments_once, preload
from soak import (
    LIMIT,
    Tally,
    Uninterrupted,
    digest_of_end,
    faults_after_a_kill,
    one_life,
    run_in,
    uninterrupted,
)

from chorus.checkpoint.store import checkpoints, step_of

pytestmark = pytest.mark.launch
STEPS = 5
soak.ENGINES["python"] = ([sys.executable, "train.py"], ("batch_size=4",))
soak.ENGINES["ddp"] = (ddp(2), ("batch_size=2",))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, forked) -> Callable[[str], Uninterrupted]:
    """The uninterrupted run of an engine, run once."""
    known: dict[str, Uninterrupted] = {}

    def of(engine: str) -> Uninterrupted:
        if engine not in known:
            known[engine] = uninterrupted(tmp_path_factory.mktemp(engine), engine, STEPS, forked(engine))
        return known[engine]

    return of


@pytest.fixture(scope="module")
def forked() -> Callable[[str], Sequence[Mapping[str, str]]]:
    """For the many cases: an engine's processes are forked, but
    where it is the launcher that gets the signal."""
    preload()
    return functools.cache(lambda engine: environments_once(soak.ENGINES[engine][0]))


def stop(number: signal.Signals, target: str, times: int) -> Strike:
    """Send a signal to the launcher or to one worker, and wait for the end of all."""

    def strike(run: Run, _: list[int], process: subprocess.Popen | Workers) -> None:
        if isinstance(process, Workers):
            who = process.pids[-1]
        else:
            who = process.pid if target == "launcher" else worker_of(run, 1)
        for time_of in range(times):
            if time_of:
                time.sleep(0.2)  # as Ctrl-C comes: from the terminal, and again from the launcher
            try:
                os.kill(who, number)
            except ProcessLookupError:
                assert time_of, "it has ended before it was struck"
        wait_for(lambda: process.poll() is not None, PATIENCE_S)

    return strike


ENDED_OR_STRUCK = (None, 0)  # an evaluation takes a second; on a slow day the onlooker may miss it


def with_settings(run: Run, *settings: str) -> Run:
    """The same run with some keys set otherwise."""
    keys = {setting.partition("=")[0] for setting in settings}
    kept = [setting for setting in run.settings if setting.partition("=")[0] not in keys]
    return run._replace(settings=[*kept, *settings])


def evaluated(run: Run) -> Run:
    """The same run with an evaluation that takes its time."""
    return with_settings(run, "eval_samples=20", "max_new_tokens_eval=300")


def said(run: Run) -> str:
    return run.output.read_text()


def assert_stopped_at_one_step(run: Run, announced: set[int], truth: Uninterrupted) -> None:
    newest = step_of(checkpoints(run.folder)[0])
    assert f"stopped and saved after step {newest};" in said(run)
    assert not faults_after_a_kill(run, announced | {newest}, truth)
    assert not (run.folder / "agents").exists()


def end(run: Run, truth: Uninterrupted, announced: set[int]) -> None:
    assert one_life(run, None, truth, Tally(), announced), said(run)[-3000:]


# ---- the sample ----


def test_two_zero2_processes_killed_and_then_stopped_through_one_of_them_end_as_if_neither_had_been(
    tmp_path: Path, truth, forked
):
    """SIGKILL in a save; then SIGINT, twice, to the second worker, in a save, with DataLoader workers."""
    run, announced, tally = (
        run_in(tmp_path, "run", "zero2", STEPS, f"save_total_limit={LIMIT}"),
        set[int](),
        Tally(),
    )
    forks = run._replace(forked=forked("zero2"))
    assert not one_life(forks, Plan("save", 2, 0.5), truth("zero2"), tally, announced)
    assert announced
    with_workers = forks._replace(settings=[*run.settings, "num_workers=1"])
    life = Life(with_workers, Pace())
    assert life.until(Plan("save", 1, 0.2), stop(signal.SIGINT, "worker", times=2)) is None, said(run)[-3000:]
    assert life.resumed_from() == life.newest > 0
    assert_stopped_at_one_step(run, announced | life.announced(), truth("zero2"))
    end(forks, truth("zero2"), announced | life.announced())


def test_a_run_killed_stopped_in_its_evaluation_and_damaged_since_ends_as_if_nothing_had_been(
    tmp_path: Path, truth, forked
):
    """SIGKILL in a save and in a step; SIGTERM in the evaluation;
    then a byte of the newest checkpoint is flipped."""
    run, announced, tally = (
        run_in(tmp_path, "run", "python", STEPS, f"save_total_limit={LIMIT}"),
        set[int](),
        Tally(),
    )
    forks = run._replace(forked=forked("python"))
    for plan in (Plan("save", 2, 0.5), Plan("step", 1, 0.5)):
        assert not one_life(forks, plan, truth("python"), tally, announced), said(run)[-3000:]
    assert sum(tally.kills.values()) == 2
    life = Life(evaluated(forks), Pace())
    assert (
        life.until(Plan("evaluation", 1, 0.0), stop(signal.SIGTERM, "launcher", times=1)) in ENDED_OR_STRUCK
    )
    newest, before = checkpoints(run.folder)[:2]
    assert step_of(newest) == STEPS
    file = newest / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    end_of_damaged = Life(forks, Pace())
    assert end_of_damaged.until(None) == 0, said(run)[-3000:]
    assert (
        f"{file}: is not as it was written (size or SHA-256 differs); this checkpoint is passed over"
        in said(run)
    )
    assert f"resuming from {before}, after {STEPS - 1} of {STEPS} steps" in end_of_damaged.said()
    assert (newest.parent / "set_aside" / newest.name).is_dir()
    assert digest_of_end(run.folder) == truth("python").end


LINE = "stopped by {}: no step is lost; resume_from_checkpoint=auto resumes it"


@pytest.mark.parametrize(
    ("engine", "when", "number", "target"),
    [
        ("python", "attention: ", signal.SIGTERM, "all"),  # said before the base is read
        ("python", "scoring the base", signal.SIGINT, "all"),
        ("ddp", "scoring the base", signal.SIGTERM, "all"),
        pytest.param("ddp", "attention: ", signal.SIGINT, "one", marks=pytest.mark.slow),
        ("ddp", "scoring the base", signal.SIGTERM, "one"),
    ],
)
def test_a_signal_outside_of_training_is_one_line_and_code_4_and_leaves_no_process(
    engine: str, when: str, number: signal.Signals, target: str, tmp_path: Path, forked
):
    """A process whose only other one was asked to end has lost it: it says that, with code 3."""
    run = evaluated(run_in(tmp_path, "run", engine, STEPS))._replace(forked=forked(engine))
    workers = start(run)
    assert isinstance(workers, Workers)
    wait_for(lambda: run.output.exists() and when in said(run), PATIENCE_S)
    asked = [pid for pid in workers.pids if pid is not None][-1 if target == "one" else 0 :]
    for pid in asked:
        os.kill(pid, number)
    wait_for(lambda: workers.poll() is not None, PATIENCE_S)
    assert workers.poll() == (3 if target == "one" else 4), said(run)[-3000:]
    assert said(run).count(LINE.format(number.name)) == len(asked), said(run)[-3000:]
    lost = "error: process 0: another process has ended"
    assert said(run).count(lost) == len(workers.pids) - len(asked), said(run)[-3000:]
    assert "Traceback" not in said(run)
    assert not processes_of(run)


@pytest.mark.parametrize(
    ("engine", "number"),
    [("ddp", signal.SIGTERM), pytest.param("python", signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_amid_an_evaluation_in_training_ends_it_on_every_process_and_the_next_life_makes_it_up(
    engine: str, number: signal.Signals, tmp_path: Path, truth, forked
):
    """To one process alone, each with batches of its own; the evaluation would take minutes."""
    run = run_in(tmp_path, "run", engine, STEPS, "eval_steps=2")._replace(forked=forked(engine))
    workers = start(with_settings(run, "eval_samples=41", "eval_batch_size=3", "max_new_tokens_eval=900"))
    assert isinstance(workers, Workers)
    wait_for(lambda: run.output.exists() and "scoring 2 agents" in said(run), PATIENCE_S)
    os.kill(next(pid for pid in reversed(workers.pids) if pid is not None), number)
    wait_for(lambda: workers.poll() is not None, PATIENCE_S)
    assert workers.exit_codes == [4] * len(workers.pids), said(run)[-3000:]
    line = "stopped and saved after step 2 and before its evaluation; resume_from_checkpoint=auto resumes"
    assert said(run).count(line) == len(workers.pids)
    assert [step_of(folder) for folder in checkpoints(run.folder)] == [2, 1]

    again = with_settings(run, "eval_samples=6", "max_new_tokens_eval=1")
    end(again, truth(engine), {1, 2})
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["scores"] for row in rows if "scores" in row}
    assert list(scores) == [0, 2, 4, 5]
    # Not of the agents before they were restored, which answer as the base.
    assert scores[2]["uniform/token/NLL"] != pytest.approx(scores[0]["base/token/NLL"], rel=1e-3)


def test_a_signal_amid_the_export_leaves_no_agents_and_loses_nothing(tmp_path: Path, truth, forked):
    run = run_in(tmp_path, "run", "python", STEPS)
    script = str(HELPERS / "fault_worker.py")
    ended = preloaded.forked([sys.executable, script], "export", "ask", *run.settings)
    assert ended.returncode == 4, ended.stderr[-3000:]
    assert ended.stderr.endswith(f"\n{LINE.format('SIGTERM')}\n"), ended.stderr[-3000:]
    assert not (run.folder / "agents").exists()
    end(run._replace(forked=forked("python")), truth("python"), set(range(1, STEPS + 1)))


# ---- the whole product, in `make soak` ----


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["first step", "step", "save"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("engine", "target"),
    [
        ("python", "launcher"),
        ("ddp", "launcher"),
        ("ddp", "worker"),
        ("zero2", "launcher"),
        ("zero2", "worker"),
    ],
)
def test_a_signal_at_any_moment_to_launcher_or_worker_saves_one_agreed_step_and_the_rest_is_bitwise(
    engine: str, target: str, number: signal.Signals, times: int, moment: str, tmp_path: Path, truth, forked
):
    run = run_in(tmp_path, "run", engine, STEPS, f"save_total_limit={LIMIT}", "num_workers=1")
    forked_run = run._replace(forked=forked(engine))
    life = Life(run if target == "launcher" and engine != "python" else forked_run, Pace())
    assert life.until(Plan(moment, 1, 0.3), stop(number, target, times)) is None, said(run)[-3000:]
    if moment != "first step" or checkpoints(run.folder):  # shortly before it there is nothing to save
        assert_stopped_at_one_step(run, life.announced(), truth(engine))
    end(forked_run, truth(engine), life.announced())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("engine", ["python", "ddp", "zero2"])
def test_a_signal_in_the_evaluation_ends_the_run_and_the_next_one_finishes_it(
    engine: str, number: signal.Signals, tmp_path: Path, truth, forked
):
    run = run_in(tmp_path, "run", engine, STEPS, f"save_total_limit={LIMIT}")
    life = Life(evaluated(run), Pace())
    assert life.until(Plan("evaluation", 1, 0.0), stop(number, "launcher", times=1)) in ENDED_OR_STRUCK
    end(run._replace(forked=forked(engine)), truth(engine), life.announced())


# ---- the soak itself would see ----


def test_a_checkpoint_that_is_lost_or_not_what_it_should_be_is_a_fault(tmp_path: Path, truth):
    true = truth("python")
    run = run_in(tmp_path, "run", "python", STEPS)
    whole = next(path for path in tmp_path.parent.rglob("python-uninterrupted/checkpoints"))
    shutil.copytree(whole, run.folder / "checkpoints")
    everything = set(range(1, STEPS + 1))
    assert not faults_after_a_kill(run, everything, true)
    newest, before = checkpoints(run.folder)[:2]
    state = newest / "state.json"
    kept = state.read_bytes()
    state.write_bytes(kept + b" ")
    assert any(str(state) in fault for fault in faults_after_a_kill(run, everything, true))
    state.write_bytes(kept)
    assert faults_after_a_kill(run, everything, true._replace(by_step=dict.fromkeys(everything, ""))), (
        "other values"
    )
    shutil.rmtree(before)
    assert faults_after_a_kill(run, everything, true) == [
        f"{run.folder}: step {STEPS - 1} was announced and is gone"
    ]
    kept_third, *beyond_the_limit = checkpoints(run.folder)[1:]
    for folder in beyond_the_limit:
        shutil.rmtree(folder)
    assert len(faults_after_a_kill(run, everything, true)) == 1
    shutil.rmtree(kept_third)
    assert len(faults_after_a_kill(run, everything, true)) == 2
