"""Which settings would make a run fit that does not."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from runs import config_of, run_of, save_run

from chorus.checkpoint.resume import find_start
from chorus.config import RunConfig, as_settings
from chorus.planning import way_out as module
from chorus.planning.forecast import Forecast, Machine
from chorus.planning.memory_forecast import forecast
from chorus.planning.way_out import split_batch, way_out

SMALL: dict[str, Any] = {"num_agents": 2, "batch_size": 8, "eval_samples": 0, "max_seq_length": 64}
SMALL["output_dir"] = "runs/no run of this name"  # a remedy depends on checkpoints that are there


def test_the_way_out_is_enough_by_forecast_and_takes_the_same_rows_a_step():
    config, gpu = RunConfig(**SMALL | {"num_agents": 4, "lambda_sw": 0.0}), Machine("cuda")
    change = {"parallel_mode": "sequential", "gradient_checkpointing": "full", **split_batch(config, 4)}
    assert (change["batch_size"], change["gradient_accumulation_steps"]) == (2, 4)
    limit = forecast(config.model_copy(update=change), "no", gpu).peak
    told = way_out(config, "no", gpu, limit)
    settings = dict(setting.split("=") for setting in told.partition(" needs ")[0].split())
    assert settings == {key: str(value) for key, value in change.items()}
    assert "are not enough by themselves" in way_out(config, "no", gpu, limit // 10)


def test_where_evaluation_is_what_does_not_fit_a_smaller_batch_of_it_is_the_way_out():
    config = RunConfig(**SMALL | {"eval_samples": 400, "eval_batch_size": 400, "max_new_tokens_eval": 300})
    told = forecast(config, "no", Machine("cuda"))
    assert told.peak > told.training
    assert way_out(config, "no", Machine("cuda"), told.training).startswith("eval_batch_size=1 needs")


def test_training_and_evaluation_that_do_not_fit_are_both_made_smaller():
    more: dict[str, Any] = {"eval_samples": 400, "eval_batch_size": 400, "max_new_tokens_eval": 900}
    config, gpu = RunConfig(**SMALL | more | {"batch_size": 64}), Machine("cuda")
    limit = forecast(
        config.model_copy(update={"gradient_checkpointing": "full", "eval_batch_size": 1}), "no", gpu
    ).peak
    told = forecast(config, "no", gpu)
    assert min(told.training, sum(told.standing.values()) + told.evaluation) > limit
    assert way_out(config, "no", gpu, limit).startswith("gradient_checkpointing=full eval_batch_size=1 needs")


def test_an_evaluation_of_answers_too_long_for_the_device_is_left_out_or_shortened():
    config = RunConfig(**SMALL | {"eval_samples": 4, "max_new_tokens_eval": 100_000})
    limit = forecast(config, "no", Machine("cuda")).training
    assert way_out(config, "no", Machine("cuda"), limit).startswith("eval_samples=0 needs")
    needed = config.model_copy(update={"metric_for_best_model": "uniform/cls/Acc"})
    assert "lower max_new_tokens_eval" in way_out(needed, "no", Machine("cuda"), limit)


@pytest.mark.parametrize(("change", "said"), [
    ({"packing": True}, "max_seq_length=20 needs"),
    ({"pad_to_multiple_of": 4096}, "max_seq_length=20 pad_to_multiple_of=3 needs"),
])  # fmt: skip
def test_where_padding_is_what_does_not_fit_a_max_seq_length_of_the_rows_is_the_way_out(
    change: dict[str, Any], said: str
):
    config = RunConfig(**SMALL | {"max_seq_length": 4096, "compile": False} | change)  # traced in seconds
    limit = forecast(config.model_copy(update={"max_seq_length": 64}), "no", Machine("cuda"), 64).peak
    assert way_out(config, "no", Machine("cuda"), limit, 4096, longest_row=20).startswith(said)


def test_a_search_takes_a_handful_of_forecasts_and_names_the_largest_batch_that_fits(
    monkeypatch: pytest.MonkeyPatch,
):
    """Each is a second or more of a large base."""
    made: list[int] = []

    def by_the_row(config: RunConfig, *_: Any) -> Forecast:
        made.append(config.batch_size)
        return Forecast({}, config.batch_size, 0, 0, 0, 0, 0)

    monkeypatch.setattr(module, "forecast", by_the_row)
    config = RunConfig(**SMALL | {"batch_size": 2**16, "lambda_sw": 0.0})
    for most in (1, 5, 2**15, 2**16 - 1):
        made.clear()
        largest = 2 ** (most.bit_length() - 1)
        assert f" batch_size={largest} gradient_acc" in way_out(config, "no", Machine("cpu"), most)
        assert len(made) <= 8


@pytest.mark.parametrize(("lambda_sw", "more"), [(0.1, "resume_from_checkpoint=null"), (0.0, "")])
def test_a_remedy_that_a_resumed_run_would_refuse_comes_with_a_fresh_start(
    accelerator: Accelerator, tmp_path: Path, lambda_sw: float, more: str
):
    config = config_of(tmp_path, lambda_sw=lambda_sw, batch_size=8, max_train_steps=4)
    assert "resume" not in as_settings(split_batch(config, 2))
    save_run(config, accelerator, 2)
    change = split_batch(config, 2)
    assert as_settings(change) == f"batch_size=4 gradient_accumulation_steps=2 {more}".strip()
    smaller = config.model_copy(update=change)
    begin = find_start(smaller, run_of(smaller, accelerator), accelerator)
    assert begin.step == (0 if more else 2)
