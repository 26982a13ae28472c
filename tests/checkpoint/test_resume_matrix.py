"""Saved in one way, resumed in another: mode, processes, accumulation, engine, at any place in an epoch."""

from itertools import product
from pathlib import Path

import pytest
import torch
from launching import BIN, ROOT, launch, zero2
from resume_matrix import NUM_ROWS, POSITIONS, WAYS, Saved, assert_goes_on, rows_to_train_on, run, save_all

from chorus.data.batches import Sample

TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return rows_to_train_on()


@pytest.fixture(scope="module")
def saved(samples: list[Sample]) -> dict[tuple, Saved]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return save_all(samples)


# Every pair of modes, every pair of accumulations, every place in the epoch.
PLACES = ((0, 1), (1, 2), (0, 4), (3, 1), (2, 2), (2, 5), (5, 0), (4, 3), (5, 5))
SAMPLE = [(WAYS[i], WAYS[j], position) for (i, j), position in zip(PLACES, [*POSITIONS] * 3, strict=True)]


def test_each_row_is_taken_once_an_epoch_however_a_step_is_split(saved: dict[tuple, Saved]):
    for of_run in saved.values():
        assert of_run.ids == saved[WAYS[0]].ids
        for epoch in (0, 1):
            rows = [row for step in range(3 * epoch, 3 * epoch + 3) for row in of_run.ids[step]]
            assert sorted(rows) == list(range(NUM_ROWS))


@pytest.mark.parametrize(("saved_way", "way", "position"), SAMPLE)
def test_a_run_goes_on_in_any_mode_and_split(saved_way, way, position, saved, samples):
    of_run, start = saved[saved_way], POSITIONS[position]
    assert_goes_on(of_run, start, run(*way, samples, of_run, start), is_bitwise=saved_way == way)


@pytest.mark.launch
@pytest.mark.slow
def test_a_run_goes_on_in_any_mode_split_number_of_processes_and_engine(saved, samples, tmp_path: Path):
    """The whole product: each of plain, DDP and ZeRO-2 resumes what all three have saved."""
    torch.save(saved, tmp_path / "plain.pt")
    for command, engine, others in (
        (TORCHRUN, "ddp", "plain"),
        (zero2(2)[:-1], "zero2", "plain,ddp"),
        (TORCHRUN, "ddp", "zero2"),
    ):
        result = launch(
            [*command, "tests/helpers/resume_matrix.py"], str(tmp_path), engine, others, timeout=3600
        )
        assert result.returncode == 0, result.stderr[-5000:]
    for origin in ("plain", "ddp", "zero2"):
        theirs = torch.load(tmp_path / f"{origin}.pt", weights_only=False)
        assert all(of_run.ids == saved[WAYS[0]].ids for of_run in theirs.values())
        for saved_way, way, start in product(theirs, WAYS, POSITIONS.values()):
            resumed = run(*way, samples, theirs[saved_way], start)
            assert_goes_on(
                theirs[saved_way], start, resumed, is_bitwise=(origin, saved_way) == ("plain", way)
            )
