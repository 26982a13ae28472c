from typing import Any

import pytest

from chorus.config import Config
from chorus.errors import InputError
from chorus.training.zero.launcher import check_launcher, deepspeed_wanted


@pytest.mark.parametrize(
    ("launcher", "key", "wanted"),
    [
        ("true", "auto", True),
        ("false", "auto", False),
        (None, "auto", False),
        ("true", True, True),
        ("false", True, True),
        ("false", False, False),
    ],
)
def test_deepspeed_runs_as_the_launcher_says_or_the_key_insists(launcher: str | None, key: Any, wanted: bool):
    environment = {} if launcher is None else {"ACCELERATE_USE_DEEPSPEED": launcher}
    assert deepspeed_wanted(Config(use_deepspeed=key), environment) is wanted


def test_a_launcher_that_starts_deepspeed_against_the_key_is_refused():
    with pytest.raises(InputError, match="'use_deepspeed' is false, but the launcher starts DeepSpeed"):
        deepspeed_wanted(Config(use_deepspeed=False), {"ACCELERATE_USE_DEEPSPEED": "true"})


@pytest.mark.parametrize(
    ("variable", "theirs", "key", "ours"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision", "no"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision", "auto"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "gradient_accumulation_steps", 4),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "max_grad_norm", 0.5),
    ],
)
def test_a_launcher_that_contradicts_the_configuration_is_refused(
    variable: str, theirs: str, key: str, ours: Any
):
    words = rf"^key '{key}' is {ours}, but the launcher (says|clips at) {theirs}; .*drop .*\Z"
    config = Config(**{key: ours})
    with pytest.raises(InputError, match=words):
        check_launcher(config, config, {variable: theirs})


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # what `accelerate launch` sets unasked, and what agrees
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_GRADIENT_CLIPPING": "none", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"},
        {"ACCELERATE_GRADIENT_CLIPPING": "0.50"},
    ],
)
def test_a_launcher_that_agrees_or_says_nothing_is_accepted(environment: dict[str, str]):
    config = Config(mixed_precision="bf16", gradient_accumulation_steps=4, max_grad_norm=0.5)
    check_launcher(config, config, environment)
