"""The memory of a GPU runs out in each phase of a run, through the launcher: a few minutes."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from launching import PATIENCE_S, ROOT, ddp, environment

from chorus.checkpoint.store import checkpoints, verify

pytestmark = [pytest.mark.gpu, pytest.mark.launch]
SETTINGS = ("num_agents=2", "batch_size=2", "debug_subset_size=100", "max_train_steps=6", "logging_steps=1")
SETTINGS = (*SETTINGS, "save_steps=2", "save_total_limit=null", "lambda_sw=0.1", "eval_on_start=false")
SETTINGS = (*SETTINGS, "pad_to_multiple_of=64", "ood_dataset_name=null", "max_new_tokens_eval=8")
UNCOMPILED = ("compile=false", "cuda_graphs=false")


@pytest.mark.parametrize(
    ("moment", "settings", "phase", "remedy", "saved"),
    [
        ("training", (*UNCOMPILED, "eval_samples=0"), "training", "gradient_checkpointing=full", [4, 2]),
        ("evaluation", (*UNCOMPILED, "eval_samples=8"), "evaluation", "eval_batch_size=16", [6, 4, 2]),
        (
            "generation",
            (*UNCOMPILED, "eval_samples=8", "eval_choices=false"),
            "evaluation",
            "eval_batch_size=16",
            [6, 4, 2],
        ),
        (
            "compiling",
            ("compile=true", "cuda_graphs=false", "eval_samples=0"),
            "training",
            "gradient_checkpointing=full",
            [],
        ),
        (
            "capture",
            ("compile=false", "cuda_graphs=true", "eval_samples=0"),
            "capturing a pass",
            "cuda_graphs=false",
            [],
        ),
        (
            "capture",
            ("compile=false", "cuda_graphs=auto", "eval_samples=0"),
            "capturing a pass",
            "cuda_graphs=false",
            [],
        ),
    ],
    ids=["training", "evaluation", "generation", "compiling", "capture", "capture that may fall back"],
)
def test_a_gpu_without_memory_left_ends_the_run_in_one_line_with_the_last_checkpoint_whole(
    moment: str, settings: tuple[str, ...], phase: str, remedy: str, saved: list[int], tmp_path: Path
):
    ended = subprocess.run(
        [
            *ddp(1)[:-1],
            *("tests/helpers/memory_worker.py", moment, f"output_dir={tmp_path}/run"),
            *(*SETTINGS, *settings),
        ],
        cwd=ROOT,
        env=environment(CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0")),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.stderr[-5000:]
    assert lines[0].startswith(f"error: process 0: out of memory in {phase}, at "), lines
    assert "asked for" in lines[0], lines
    assert remedy in lines[0], lines
    assert "Traceback" not in ended.stderr.partition(lines[0])[0]
    assert re.findall(r"exitcode +: (-?\d+) ", ended.stderr) == ["3"], ended.stderr[-3000:]
    assert [verify(folder).step for folder in checkpoints(tmp_path / "run")] == saved
