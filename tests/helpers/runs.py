"""Configurations and checkpoints of a run that never took a step."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from saving import state_of
from transformers import AutoTokenizer

from chorus.checkpoint.resume import (
    describe_run,
)
from chorus.checkpoint.store import write_checkpoint
from chorus.config import Config
from chorus.data.rows import data_fingerprint
from chorus.data.templates import Problem

ROWS = [Problem("1 + 1 =", " 2"), Problem("2 + 2 =", " 4")]


def run_of(
    config: Config, accelerator: Accelerator, rows: list[Problem] = ROWS, **more: Any
) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny-gemma-2")
    run = describe_run(config, data_fingerprint(rows), tokenizer, "no", accelerator)
    num_steps = 4 if config.max_train_steps is None else config.max_train_steps
    return {**run, "fingerprints": {**run["fingerprints"], "base": "0" * 64}, "num_steps": num_steps, **more}


def save_run(config: Config, accelerator: Accelerator, step: int) -> Path:
    facts = {"format": 1, "step": step, "optimizer_step": step, **run_of(config, accelerator)}
    return write_checkpoint(Path(config.output_dir), state_of(float(step)), facts, config)


def config_of(folder: Path, **more: Any) -> Config:
    return Config(**{"output_dir": str(folder), "save_total_limit": None, "num_agents": 2, **more})
