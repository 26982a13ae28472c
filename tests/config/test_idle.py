"""Keys that are set and do nothing are said, with what would make them do something."""

from pathlib import Path
from typing import Any

import pytest

from chorus.config import Config, load_config
from chorus.config.idle import idle_keys

ROOT = Path(__file__).parents[2]
PAIRS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"epochs": 5}, "max_train_steps is 100; set max_train_steps=null", {"max_train_steps": None}),
    (
        {"agents_per_pass": 2, "parallel_mode": "sequential"},
        "set parallel_mode=fused",
        {"parallel_mode": "fused"},
    ),
    ({"swd_points_per_row": 4, "lambda_sw": 0.0}, "set lambda_sw above 0", {"lambda_sw": 0.1}),
    ({"responsibility_floor": 0.3}, "set responsibility_alpha below 1", {"responsibility_alpha": 0.5}),
    ({"eval_steps": 5, "eval_samples": 0}, "set eval_samples above 0", {"eval_samples": 1}),
    (
        {"mixture_observations": "token"},
        "set dirichlet_alpha_aggregator",
        {"dirichlet_alpha_aggregator": 1.0},
    ),
]


@pytest.mark.parametrize(("settings", "said", "remedy"), PAIRS)
def test_a_key_that_another_makes_idle_is_said_until_its_remedy_is_taken(
    settings: dict[str, Any], said: str, remedy: dict[str, Any]
):
    key = next(iter(settings))
    [line] = idle_keys(Config.model_validate(settings))
    assert line.startswith(f"key '{key}' is {settings[key]} and does nothing, as ")
    assert said in line
    assert idle_keys(Config.model_validate(settings | remedy)) == []


@pytest.mark.parametrize("file", sorted(map(str, (ROOT / "recipes").glob("*.yaml"))))
def test_no_recipe_sets_a_key_that_does_nothing(file: str):
    assert idle_keys(load_config(["--config", file])) == []


def test_the_defaults_say_nothing():
    assert idle_keys(Config()) == []
