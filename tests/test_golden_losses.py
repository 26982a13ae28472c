"""The first losses of a run on the built-in arithmetic: a change of the mathematics shows here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator

import train as script
from chorus.checkpoint.store import Checkpointer
from chorus.config import RunConfig
from chorus.config.execution import Mode
from chorus.data.batches import training_steps
from chorus.data.rows import read_rows
from chorus.model.adapters import lora_shape
from chorus.model.agents import Regularisation, build_agents
from chorus.model.base import load_model, load_tokenizer
from chorus.monitoring.run_log import RunLog
from chorus.training.engine import start_engine

NUM_STEPS = 4
LOSSES = [  # of each agent at each step, nats a token; the first step has learning rate 0
    [2.7516109936857878] * 4,
    [2.752479471186156] * 4,
    [2.616203675526735, 2.6131550299884916, 2.6063579959166963, 2.6145735354328967],
    [2.6261364164806547, 2.61595943390377, 2.599638439360119, 2.6200267004588293],
]
DISTANCES = [0.0, 0.0, 0.00011855115735670552, 0.0002824713883455843]


class Rows(RunLog):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Mapping[str, Any]] = []

    def advance(self, metrics: Mapping[str, Any] | None) -> None:
        assert metrics is not None
        self.rows.append(metrics)


class NoCheckpoints(Checkpointer):
    def save(self, *_: Any, **__: Any) -> None:
        pass


@pytest.mark.parametrize("mode", get_args(Mode))
def test_the_first_losses_of_a_run_are_unchanged(mode: Mode, tmp_path: Path):
    config = RunConfig(
        parallel_mode=mode, logging_steps=1, dataset_name="arithmetic", lr=2e-3, lambda_sw=0.01
    )
    model = load_model(config.model_name, torch.float32, torch.device("cpu"))
    rates = Regularisation(config.dropconnect_p, config.lora_dropout, config.seed)
    agents = build_agents(mode, model, config.num_agents, lora_shape(config), rates)
    tokenizer = load_tokenizer(config.model_name)
    samples = read_rows(config, config.seed, tokenizer).train
    steps = training_steps(
        samples,
        config,
        config,
        agents=agents.agents,
        points_per_row=config.swd_points_per_row,
        pad_id=1,
        process_index=0,
        num_processes=1,
        num_steps=NUM_STEPS,
    )
    engine, rows = start_engine(Accelerator(cpu=True), agents, config), Rows()
    script.train(engine, steps, 0, NUM_STEPS, config, NoCheckpoints(tmp_path, config, {}), rows)
    for row, losses, distance in zip(rows.rows, LOSSES, DISTANCES, strict=True):
        # Other CPUs round otherwise.
        assert row["task_loss_per_agent"] == pytest.approx(losses, rel=1e-5)
        assert row["swd"] == pytest.approx(distance, rel=1e-3, abs=1e-6)
