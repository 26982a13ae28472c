"""ZeRO stage 3 and the optimizer's state on the CPU: the files of recipes/deepspeed, in real processes."""

import json
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from launching import PLAIN, ddp
from preloaded import forked, train
from safetensors.torch import load_file
from toy import gradients_of, max_difference, toy_agents, toy_batch

from chorus.checkpoint.store import write_checkpoint
from chorus.config import Config
from chorus.model.agents import Mode
from chorus.training.engine import start_engine
from chorus.training.state import read_state, restore_state

EXACT = 2e-5
ZERO3 = "deepspeed_config_file=recipes/deepspeed/zero3.json"
OFFLOAD = "deepspeed_config_file=recipes/deepspeed/zero2_cpu_offload.json"
# Three held-out problems in batches of one: the second of two processes has a batch less.
SETTINGS = (
    *(
        "dataset_name=arithmetic",
        "lr=2e-3",
        "num_agents=2",
        "debug_subset_size=100",
        "max_train_steps=4",
        "save_steps=2",
        "logging_steps=1",
        "lambda_sw=0.2",
    ),
    # The head is read beside the passes, in which its shards are together.
    *("swd_space=probabilities", "responsibility_alpha=0.5", "eval_steps=2"),
    *("dropconnect_p=0.1", "eval_samples=3", "eval_batch_size=1", "max_new_tokens_eval=4"),
)


@pytest.mark.launch
def test_two_zero3_processes_have_the_gradients_and_take_the_step_of_a_plain_one(tmp_path: Path):
    """And each holds half of the base between passes: sharding_worker.py asserts it."""
    config = Config(batch_size=4, lambda_sw=0.0, max_grad_norm=0.0, lr=0.01, num_agents=3)
    plain = start_engine(Accelerator(cpu=True), toy_agents("sequential"), config)
    step(plain)
    state = read_state(plain)
    state = state._replace(optimizer_step=5)
    restore_state(plain, state)
    facts = {"format": 1, "step": 5, "optimizer_step": 5}
    checkpoint = write_checkpoint(tmp_path, state, facts, config)
    step(plain)

    result = forked([*ddp(2)[:-1], "tests/helpers/sharding_worker.py"], str(checkpoint))
    assert result.returncode == 0, result.stderr[-3000:]
    for mode, checkpointing in product(get_args(Mode), ("none", "full")):
        agents = toy_agents(mode, dropconnect_p=0.4)
        agents(toy_batch(), step=3, slot=1).nll_KBT.sum().backward()
        found = torch.load(checkpoint / f"{mode}-{checkpointing}.pt", weights_only=True)
        for identity, gradient in gradients_of(agents).items():
            assert max_difference(found[json.dumps(identity)], 2 * gradient) < EXACT, (mode, identity)
    after = torch.load(checkpoint / "after.pt", weights_only=True)
    for identity, tensor in plain.agents.adapter_tensors().items():
        assert max_difference(after[json.dumps(identity)], tensor) < EXACT, identity


def step(engine: Any) -> None:
    with engine.micro_batch(is_last=True):
        engine.backward(engine.module(toy_batch(), step=0).nll_KBT.mean())
    engine.step(0.01)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, train(PLAIN, folder, *SETTINGS, "batch_size=4")


def assert_same_run(folder: Path, rows: list[dict], other: Path, other_rows: list[dict]) -> None:
    assert len(rows) == len(other_rows) == 4
    for row, other_row in zip(rows, other_rows, strict=True):
        for key in ("loss", "grad_norm", "task_loss_per_agent"):
            assert row[key] == pytest.approx(other_row[key], rel=EXACT), (key, row)
    last = Path("checkpoints", "step_000004", "optimizer.safetensors")
    moments, other_moments = load_file(folder / last), load_file(other / last)
    for name, tensor in moments.items():
        assert torch.allclose(tensor, other_moments[name], rtol=1e-3, atol=1e-7), name
    scores, other_scores = (
        json.loads((place / "ensemble.json").read_text())["evaluation"]["after"]["scores"]
        for place in (folder, other)
    )
    for name, score in scores.items():
        for metric, value in score.items():
            if value is not None:  # such as an AUROC where nothing is right
                assert value == pytest.approx(other_scores[name][metric], rel=1e-4, abs=1e-6), (name, metric)


@pytest.mark.launch
def test_a_base_in_shards_trains_scores_and_saves_as_a_whole_one(
    plain_run: tuple[Path, list[dict]], tmp_path: Path
):
    rows = train(ddp(2), tmp_path, *SETTINGS, "batch_size=2", "use_deepspeed=true", ZERO3)
    assert "DeepSpeed ZeRO-3 is active" in (tmp_path / "train.log").read_text()
    assert_same_run(*plain_run, tmp_path, rows)


@pytest.mark.launch
def test_a_run_goes_on_with_the_optimizers_state_on_the_cpu(
    plain_run: tuple[Path, list[dict]], tmp_path: Path
):
    begun = f"resume_from_checkpoint={plain_run[0]}/checkpoints/step_000002"
    rows = train(PLAIN, tmp_path, *SETTINGS, "batch_size=4", "use_deepspeed=true", OFFLOAD, begun)
    assert [row["step"] for row in rows] == [3, 4]
    assert_same_run(*plain_run, tmp_path, plain_run[1][:2] + rows)
