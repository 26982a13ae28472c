"""Scores while a run trains: the best step, early stopping and what a resumed run knows of them."""

import json
import shutil
from pathlib import Path

import pytest
from launching import PLAIN
from preloaded import forked, train
from safetensors.torch import load_file

from chorus.checkpoint.state_file import BestStep, read_state_file
from chorus.checkpoint.store import checkpoints, step_of
from chorus.config import RunConfig
from chorus.errors import InputError
from chorus.monitoring.evaluation import check_evaluation

METRIC = "uniform/token/NLL"
# A learning rate that ruins the agents from the second step on (the first step's is 0): step 1 stays the
# best.
SETTINGS = (
    *(
        "num_agents=2",
        "lora_rank=2",
        "batch_size=2",
        "debug_subset_size=20",
        "logging_steps=1",
        "lr=0.9",
        "lambda_sw=0",
    ),
    *(
        "eval_samples=4",
        "max_new_tokens_eval=3",
        "ood_dataset_name=null",
        "eval_steps=1",
        "max_train_steps=8",
    ),
    *(f"metric_for_best_model={METRIC}", "early_stopping_patience=3", "load_best_model_at_end=true"),
    *("save_steps=1", "save_total_limit=2", "num_warmup_steps_ratio=0.2"),
)


def scores(folder: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["scores"] for row in rows if "scores" in row}


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(PLAIN, folder, *SETTINGS)
    return folder


@pytest.mark.launch
def test_a_run_stops_when_patience_is_over_and_keeps_its_best_checkpoint(stopped_run: Path):
    found = scores(stopped_run)
    nlls = {step: own[METRIC] for step, own in found.items() if METRIC in own}
    best = min(nlls, key=lambda step: nlls[step])
    last = max(step for step in nlls)
    assert last == best + 3 < 8
    assert {step_of(folder) for folder in checkpoints(stopped_run)} == {best, last - 1, last}
    saved = read_state_file(checkpoints(stopped_run)[0])
    assert saved.best == BestStep(step=best, metric=METRIC, value=nlls[best], scorings_since=3)
    assert saved.stopped_early


@pytest.mark.launch
def test_the_best_agents_are_exported_and_scored(stopped_run: Path):
    best = min(checkpoints(stopped_run), key=step_of)
    for agent in ("agent_0", "agent_1"):
        file = Path("agents", agent, "adapter_model.safetensors")
        saved, exported = load_file(best / file), load_file(stopped_run / file)
        assert all((saved[name] == exported[name]).all() for name in saved)
    after = json.loads((stopped_run / "ensemble.json").read_text())["evaluation"]["after"]["scores"]
    assert after["uniform"]["token/NLL"] == pytest.approx(read_state_file(best).best.value, rel=1e-5)


@pytest.mark.launch
def test_a_run_that_has_stopped_is_finished(stopped_run: Path):
    before = (stopped_run / "metrics.jsonl").read_text()
    result = forked(PLAIN, f"output_dir={stopped_run}", *SETTINGS)
    assert result.returncode == 0
    assert "nothing is left to do" in result.stdout
    assert (stopped_run / "metrics.jsonl").read_text() == before


@pytest.mark.launch
def test_a_resumed_run_knows_its_initial_scores_and_its_best_step(stopped_run: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    for checkpoint in checkpoints(folder)[:2]:  # back to the best step, of a life that was cut short there
        shutil.rmtree(checkpoint)
    (folder / "ensemble.json").unlink()
    initial = read_state_file(checkpoints(folder)[0]).initial_scores.report["scores"]
    result = forked(PLAIN, f"output_dir={folder}", *SETTINGS)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "scoring the base" not in result.stderr
    again = json.loads((folder / "ensemble.json").read_text())["evaluation"]
    assert again["before"]["scores"] == initial
    assert again["after"]["scores"]["base"] == initial["base"]
    assert scores(folder) == scores(stopped_run)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience.*set metric_for_best_model"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end.*set metric_for_best_model"),
        ({"metric_for_best_model": METRIC}, "eval_steps is 0; set it"),
        ({"metric_for_best_model": METRIC, "eval_steps": 1, "eval_samples": 0}, "eval_samples is 0; set it"),
        ({"metric_for_best_model": "uniform/token/NL", "eval_steps": 1}, "did you mean 'uniform/token/NLL'"),
        ({"metric_for_best_model": "agent_9/token/NLL", "eval_steps": 1}, "did you mean 'agent_"),
        ({"metric_for_best_model": "fitted/cls/Acc", "eval_steps": 1}, "is not scored"),
        ({"metric_for_best_model": "agent_0/ens/Ambiguity", "eval_steps": 1}, "is not scored"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: dict, message: str):
    with pytest.raises(InputError, match=message):
        check_evaluation(RunConfig(num_agents=2, **keys))


def test_a_metric_of_the_fitted_mixture_needs_its_prior():
    keys = {"metric_for_best_model": "fitted/calibrated/sc/PRR/mutual_information", "eval_steps": 5}
    check_evaluation(RunConfig(**keys, dirichlet_alpha_aggregator=1.0))
