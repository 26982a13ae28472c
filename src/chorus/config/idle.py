"""Keys that are set and do nothing, because of another key."""

from collections.abc import Iterator
from typing import NamedTuple

from chorus.config.keys import Config


class _Idle(NamedTuple):
    """Keys that do nothing, because of what; and what to set for them to do something."""

    keys: tuple[str, ...]
    because: str
    remedy: str


def idle_keys(config: Config) -> list[str]:
    """A line for the log for each key that differs from its default and that another key makes idle."""
    return [
        f"key {key!r} is {getattr(config, key)} and does nothing, as {idle.because}; {idle.remedy}"
        for idle in _idle(config)
        for key in idle.keys
        if getattr(config, key) != type(config).model_fields[key].default
    ]


def _idle(config: Config) -> Iterator[_Idle]:
    if config.max_train_steps is not None:
        steps = f"max_train_steps is {config.max_train_steps}"
        yield _Idle(("epochs",), steps, "set max_train_steps=null to train for so many epochs")
    if config.parallel_mode != "fused":
        mode = f"parallel_mode is {config.parallel_mode}, one agent a pass"
        yield _Idle(("agents_per_pass",), mode, "set parallel_mode=fused, or leave it out")
    if config.lambda_sw == 0:
        of_distance = ("lambda_sw_warmup_ratio", "lambda_sw_decay_ratio", "swd_space", "swd_num_projections")
        of_points = ("swd_representation", "swd_points_per_row")
        yield _Idle(of_distance + of_points, "lambda_sw is 0", "set lambda_sw above 0, or leave it out")
    if config.responsibility_alpha == 1:
        alpha = "responsibility_alpha is 1"
        yield _Idle(("responsibility_floor",), alpha, "set responsibility_alpha below 1, or leave it out")
    if config.eval_samples == 0:
        yield _Idle(("eval_steps",), "eval_samples is 0", "set eval_samples above 0, or leave it out")
    if config.dirichlet_alpha_aggregator is None:
        plain = "dirichlet_alpha_aggregator is null"
        yield _Idle(("mixture_observations",), plain, "set dirichlet_alpha_aggregator, or leave it out")
