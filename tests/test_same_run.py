"""The same run, whatever carries it: mode, engine, number of processes, accumulation."""

from pathlib import Path

import pytest
import torch
from folders import adapters
from launching import PLAIN, ddp, zero2
from preloaded import train

pytestmark = pytest.mark.launch
SMALL = ("num_agents=3", "eval_samples=0", "logging_steps=1", "debug_subset_size=200")


def assert_same_run(
    one: Path, other: Path, rows: list[dict], other_rows: list[dict], tolerance: float
) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        for key in ("loss", "lr", "grad_norm"):
            assert row[key] == pytest.approx(other_row[key], rel=tolerance), (key, row, other_row)
        assert row["task_loss_per_agent"] == pytest.approx(other_row["task_loss_per_agent"], rel=tolerance)
        assert (row["swd"] or 0) == pytest.approx(other_row["swd"] or 0, rel=100 * tolerance, abs=1e-6)
    weights, other_weights = adapters(one), adapters(other)
    assert weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, other_weights[name], rtol=0, atol=2e-4), name


COUPLED = (*SMALL, "max_train_steps=4", "lambda_sw=0.2", "dropconnect_p=0.1", "gradient_accumulation_steps=2")


@pytest.fixture(scope="module")
def coupled_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """One process, 8 rows a micro-batch, two micro-batches, lambda > 0, DropConnect."""
    folder = tmp_path_factory.mktemp("coupled")
    return folder, train(PLAIN, folder, *COUPLED, "batch_size=8", "parallel_mode=parallel")


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        (PLAIN, ("batch_size=8", "parallel_mode=sequential")),
        (PLAIN, ("batch_size=8", "use_deepspeed=true", "use_gradient_checkpointing=true")),
        (ddp(2), ("batch_size=4", "parallel_mode=parallel")),
        (zero2(2), ("batch_size=4", "parallel_mode=fused")),
        pytest.param(
            zero2(2),
            ("batch_size=4", "parallel_mode=sequential", "num_workers=1"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "sequential",
        "zero2-programmatic-checkpointing",
        "ddp-2",
        "zero2-2-fused",
        "zero2-2-sequential-workers",
    ],
)
def test_one_process_of_8_rows_equals_two_of_4_in_every_mode_and_engine(
    coupled_run: tuple[Path, list[dict]], tmp_path: Path, command: list[str], settings: tuple[str, ...]
):
    folder, rows = coupled_run
    other_rows = train(command, tmp_path, *COUPLED, *settings)
    assert_same_run(folder, tmp_path, rows, other_rows, tolerance=2e-5)
    if "--config_file" in command:
        assert "DeepSpeed ZeRO-2 is active" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(
    ("command", "accumulation"), [(zero2(2), 2), pytest.param(ddp(4), 1, marks=pytest.mark.slow)]
)
def test_one_process_accumulating_four_equals_more_processes_accumulating_less(
    command: list[str], accumulation: int, tmp_path: Path
):
    settings = (*SMALL, "max_train_steps=3", "lambda_sw=0", "batch_size=3", "max_grad_norm=0.5")
    rows = train(PLAIN, tmp_path / "one", *settings, "gradient_accumulation_steps=4")
    more = train(command, tmp_path / "more", *settings, f"gradient_accumulation_steps={accumulation}")
    assert_same_run(tmp_path / "one", tmp_path / "more", rows, more, tolerance=2e-5)
