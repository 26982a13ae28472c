"""Disks that are really full: a small tmpfs in a mount namespace
of its own; for the log, a limit on a file's size."""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import PATIENCE_S, ROOT, ddp, environment
from preloaded import Workers, environments_once, preload, train

from chorus.checkpoint.store import checkpoints, step_of, verify

pytestmark = pytest.mark.launch
IN_A_NAMESPACE = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
ON_A_SMALL_DISK = (
    'mount -t tmpfs -o "size=$0k" tmpfs "$1" && shift && "$@"; code=$?; cp -r "$DISK/." "$KEPT"; exit $code'
)
MOMENTS_AND_WEIGHTS = 466_944  # 12 bytes for each number of two agents' adapters
SETTINGS = (
    *(
        "num_agents=2",
        "lora_rank=8",
        "lora_target_modules=[down_proj]",
        "eval_samples=0",
        "debug_subset_size=40",
    ),
    *("batch_size=2", "logging_steps=1"),
)


@functools.cache
def why_no_small_disk() -> str | None:
    if shutil.which("unshare") is None:
        return "there is no unshare"
    tried = subprocess.run([*IN_A_NAMESPACE, "mount -t tmpfs tmpfs /mnt"], capture_output=True, text=True)
    return tried.stderr.strip() or None


def run_on_a_disk_of(
    kib: int, folder: Path, command: list[str], *settings: str
) -> subprocess.CompletedProcess[str]:
    """A run whose `output_dir` is on a disk of so many KiB. What is left on it then lies in `folder`/kept."""
    if why_no_small_disk():
        pytest.skip(f"no small disk can be mounted here: {why_no_small_disk()}")
    disk, kept = folder / "disk", folder / "kept"
    disk.mkdir()
    kept.mkdir()
    run = [*command, *SETTINGS, *settings, f"output_dir={disk}/run"]
    return subprocess.run(
        [*IN_A_NAMESPACE, ON_A_SMALL_DISK, str(kib), str(disk), *run],
        cwd=ROOT,
        env=environment(DISK=str(disk), KEPT=str(kept)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def errors_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def assert_says_the_bytes(line: str, what: str, needed: int | None = None) -> None:
    found = re.search(r"could not be written: .*\(([\d,]+) bytes needed, ([\d,]+) free\); .*make room", line)
    assert found, line
    assert what in line
    if needed is not None:
        assert int(found[1].replace(",", "")) == needed > int(found[2].replace(",", ""))


def assert_all_are_out_with_code_3(result: subprocess.CompletedProcess[str]) -> None:
    """torchrun says how each of its two workers ended, and ends one that is slow to leave after the other."""
    assert result.returncode != 0
    codes = re.findall(r"^  exitcode +: (-?\d+) ", result.stderr, re.MULTILINE)
    assert sorted(codes) in (["3", "3"], ["-15", "3"]), result.stderr[-3000:]
    assert len(errors_of(result)) in (1, 2)
    assert len(set(errors_of(result))) == 1, "the same words on both"


def test_a_disk_full_at_a_later_save_leaves_the_earlier_checkpoint_and_every_process_says_so(tmp_path: Path):
    result = run_on_a_disk_of(
        800, tmp_path, ddp(2), "max_train_steps=6", "save_steps=2", "parallel_mode=parallel"
    )
    assert_all_are_out_with_code_3(result)
    for line in errors_of(result):
        assert_says_the_bytes(line, "run/checkpoints/step_000004 could not", MOMENTS_AND_WEIGHTS)
        assert "earlier checkpoints are whole" in line
    (left,) = checkpoints(tmp_path / "kept" / "run")
    assert verify(left).step == 2


def test_a_disk_full_in_the_export_leaves_the_last_checkpoint_and_no_agents(tmp_path: Path):
    result = run_on_a_disk_of(600, tmp_path, [sys.executable, "train.py"], "max_train_steps=2")
    assert result.returncode == 3, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    (line,) = errors_of(result)
    assert_says_the_bytes(line, "run/agents could not", MOMENTS_AND_WEIGHTS // 3)
    (left,) = checkpoints(tmp_path / "kept" / "run")
    assert verify(left).step == 2
    assert not (tmp_path / "kept" / "run" / "agents").exists()


@pytest.mark.slow
def test_a_disk_full_at_the_first_save_leaves_no_checkpoint(tmp_path: Path):
    result = run_on_a_disk_of(300, tmp_path, ddp(2), "max_train_steps=6", "save_steps=2")
    assert_all_are_out_with_code_3(result)
    for line in errors_of(result):
        assert_says_the_bytes(line, "run/checkpoints/step_000002 could not", MOMENTS_AND_WEIGHTS)
    assert not checkpoints(tmp_path / "kept" / "run")


# Of two settings of one key the later one holds.
ONE_SMALL_AGENT = (*SETTINGS, "num_agents=1", "lambda_sw=0", "lora_rank=1", "lora_target_modules=[q_proj]")


def errors_with_small_files(folder: Path, *settings: str) -> list[str]:
    """What two processes say of a run in `folder`/run in which no file can grow beyond 16,000 bytes: a
    checkpoint's are smaller. Both must end with code 3.
    """
    preload()
    said = folder / "said"
    keys = [*ONE_SMALL_AGENT, *settings, f"output_dir={folder}/run"]
    workers = Workers(environments_once(ddp(2)), keys, said, most_bytes=16_000)
    try:
        workers.wait()
    finally:
        workers.kill()
    assert workers.exit_codes == [3, 3], said.read_text()[-3000:]
    errors = [line for line in said.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert len(set(errors)) == 1, "the same words on both"
    return errors


def test_a_log_that_can_grow_no_more_ends_every_process_and_leaves_the_checkpoints(tmp_path: Path):
    """The rows of the steps reach the limit first."""
    for line in errors_with_small_files(tmp_path, "max_train_steps=1000", "save_steps=5"):
        assert_says_the_bytes(line, f"{tmp_path}/run/metrics.jsonl could not")
    assert [step_of(folder) % 5 for folder in checkpoints(tmp_path / "run")] == [0, 0, 0]
    assert all(verify(folder) for folder in checkpoints(tmp_path / "run"))


def test_a_log_line_beside_the_steps_that_the_disk_refuses_ends_every_process_alike(tmp_path: Path):
    """The first line of a run that goes on, which the first
    process alone writes, before the model is there."""
    run, steps = tmp_path / "run", ("max_train_steps=4", "save_steps=2")
    train([sys.executable, "train.py"], run, *ONE_SMALL_AGENT, *steps, "batch_size=4")
    shutil.rmtree(run / "checkpoints" / "step_000004")
    log = run / "train.log"
    log.write_text(log.read_text().ljust(15_990))
    for line in errors_with_small_files(tmp_path, *steps):
        assert_says_the_bytes(line, f"{log} could not")
    assert [verify(folder).step for folder in checkpoints(run)] == [2]
