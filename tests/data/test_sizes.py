"""Keys that ask for more room than the rows fill."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rows import data_config, read_rows, write_lines

from chorus.config import RunConfig
from chorus.data.batches import StepBatch, training_steps
from chorus.data.samples import Samples
from chorus.data.sizes import no_larger_than_the_rows

HUGE = 2**20


@pytest.fixture
def rows(tmp_path: Path) -> Samples:
    lines = [{"question": "a " * (count % 5 + 1), "answer": "b " * (count % 3 + 1)} for count in range(12)]
    return read_rows(data_config(write_lines(tmp_path / "rows.jsonl", lines), max_seq_length=64)).train


def steps_of(config: RunConfig, rows: Samples, process: int, processes: int) -> list[StepBatch]:
    return list(
        training_steps(
            rows,
            config,
            config,
            agents=[0],
            points_per_row=config.swd_points_per_row,
            pad_id=0,
            process_index=process,
            num_processes=processes,
            num_steps=3,
        )
    )


def test_a_configuration_that_its_rows_fill_stays_as_it_is(rows: Samples):
    for processes, accumulation in ((1, 3), (3, 1)):
        sizes: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "swd_points_per_row": 2}
        config = RunConfig(batch_size=4, **sizes)
        assert no_larger_than_the_rows(config, rows, processes) is not config
        assert no_larger_than_the_rows(config, rows, processes) == config


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("key", ["batch_size", "gradient_accumulation_steps"])
def test_a_batch_far_larger_than_the_data_takes_the_rows_of_one_that_holds_them_all(
    rows: Samples, key: str, packing: bool, processes: int
):
    given = RunConfig(batch_size=5, packing=packing, max_seq_length=64, swd_points_per_row=HUGE)
    config = no_larger_than_the_rows(given.model_copy(update={key: HUGE}), rows, processes)
    assert config.batch_size <= len(rows)
    assert config.batch_size * processes * (config.gradient_accumulation_steps - 1) < len(rows)
    just = given.model_copy(update={key: len(rows), "swd_points_per_row": 63})
    for process in range(processes):
        for step, whole in zip(
            steps_of(config, rows, process, processes), steps_of(just, rows, process, processes), strict=True
        ):
            assert (step.num_targets, step.num_rows) == (whole.num_targets, whole.num_rows)
            assert len(step.micro_batches) <= 3
            for batch, same in zip(step.micro_batches, whole.micro_batches, strict=False):
                assert torch.equal(batch.input_BT, same.input_BT)
                assert batch.points_SM.shape[1] < same.points_SM.shape[1]  # of a row's tokens, not of the key
                assert (batch.points_SM >= 0).sum() == (same.points_SM >= 0).sum()
            for empty in whole.micro_batches[len(step.micro_batches) :]:
                assert not empty.mask_BT.any()
