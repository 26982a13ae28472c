"""Which settings would make a run fit that does not, found by a handful of forecasts."""

from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

from chorus.checkpoint.store import checkpoints
from chorus.config import Config, RunConfig, as_settings
from chorus.planning.forecast import Forecast, Machine, in_words
from chorus.planning.memory_forecast import forecast, longest_batch

# From the cheapest in time to the dearest.
ROOM_TO_MAKE: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": "selective"},
    {"gradient_checkpointing": "full"},
    {"parallel_mode": "sequential"},
    {"parallel_mode": "sequential", "gradient_checkpointing": "full"},
)
NOTHING_HELPS = (
    "gradient_checkpointing=full, parallel_mode=sequential and batch_size=1 are not enough by themselves; "
    "take a smaller base, fewer agents, a smaller max_seq_length or a larger device"
)
EVALUATION_IS_TOO_MUCH = "training fits, and evaluation does not; lower max_new_tokens_eval"


class _Search:
    """Forecasts of one configuration with changes, each made once."""

    def __init__(self, config: RunConfig, precision: str, machine: Machine, limit: int, length: int | None):
        self.config, self.precision, self.machine, self.limit = config, precision, machine, limit
        self.length = length or longest_batch(config)
        self.known: dict[str, Forecast] = {}

    def told(self, change: dict[str, Any]) -> Forecast:
        key = as_settings(change)
        if key not in self.known:
            changed = self.config.model_copy(update=change)
            length = min(self.length, longest_batch(changed))
            self.known[key] = forecast(changed, self.precision, self.machine, length)
        return self.known[key]

    def trains(self, change: dict[str, Any]) -> bool:
        return self.told(change).training <= self.limit

    def scores(self, change: dict[str, Any]) -> bool:
        told = self.told(change)
        return sum(told.standing.values()) + told.evaluation <= self.limit


def way_out(
    config: RunConfig,
    precision: str,
    machine: Machine,
    limit: int,
    length: int | None = None,
    longest_row: int | None = None,
    told: Forecast | None = None,
) -> str:
    """The first change of settings that is enough, by forecast, as one may type it; or that none is.

    Args:
        length: T of the longest batch, as `forecast` takes it.
        longest_row: tokens of the longest row, where it is known.
        told: the forecast of the configuration as it is, where there is one.
    """
    search = _Search(config, precision, machine, limit, length)
    if told is not None:
        search.known[as_settings({})] = told
    change = _for_training(search, longest_row)
    if change is None:
        return NOTHING_HELPS
    if not search.scores(change):
        leaner = (change | less for less in _less_evaluation(config))
        change = next((more for more in leaner if search.scores(more)), None)
        if change is None:
            return EVALUATION_IS_TOO_MUCH
    return f"{as_settings(change)} needs {in_words(search.told(change).peak)}"


def _for_training(search: _Search, longest_row: int | None) -> dict[str, Any] | None:
    """The first change with which training fits, {} where it fits as it is; None: there is none.

    A smaller batch comes with more of them in a step, which leaves its rows what they are.
    """
    if search.trains({}):
        return {}
    config = search.config
    shorter = _as_long_as_the_rows(config, search.length, longest_row)
    if shorter and search.trains(shorter):
        return shorter
    passes = [change for change in ROOM_TO_MAKE if _makes_room(config, change, search.machine)]
    leanest = passes[-1] if passes else {}
    if passes and search.trains(leanest):  # most often the others are then tried, and one is enough
        return next(change for change in passes if search.trains(change))
    splits = [leanest | split_batch(config, parts) for parts in _parts(config.batch_size)]
    if not splits or not search.trains(splits[-1]):
        return None
    # Memory falls with the batch: the first split that is enough lies before the first one known to be.
    enough, too_little = len(splits) - 1, -1
    while enough - too_little > 1:
        middle = (enough + too_little) // 2
        enough, too_little = (middle, too_little) if search.trains(splits[middle]) else (enough, middle)
    return splits[enough]


def _makes_room(config: RunConfig, change: dict[str, Any], machine: Machine) -> bool:
    """Whether the change recomputes more, or has fewer agents in a pass, than the configuration does."""
    wanted, has = change.get("gradient_checkpointing", "none"), config.recomputation
    if wanted == "selective" and machine.base_in_shards:  # shards do not go with it
        return False
    order = ("none", "selective", "full")
    if "parallel_mode" in change and config.parallel_mode != "sequential":
        return "gradient_checkpointing" not in change or has != "full"
    return order.index(wanted) > order.index(has) and "parallel_mode" not in change


def _as_long_as_the_rows(config: RunConfig, length: int, longest_row: int | None) -> dict[str, Any]:
    """A `max_seq_length` that cuts no row, where batches are padded to twice that or more; {} otherwise."""
    if longest_row is None or length < 2 * longest_row or longest_row < 2:
        return {}
    change: dict[str, Any] = {"max_seq_length": longest_row}
    if config.padding > 1:
        change["pad_to_multiple_of"] = ceil(longest_row / 8)
    return change | _from_the_start(config)


def _less_evaluation(config: RunConfig) -> Iterator[dict[str, Any]]:
    if config.eval_batch_size > 1:
        yield {"eval_batch_size": 1}
    if config.metric_for_best_model is None:  # which needs scores
        yield {"eval_samples": 0}


def _parts(batch_size: int) -> Iterator[int]:
    parts = 2
    while batch_size % parts == 0 and parts < batch_size:
        yield parts
        parts *= 2
    if batch_size > 1:
        yield batch_size


def smaller_batch(config: Config) -> dict[str, Any]:
    """The same rows in a step, in the next smaller micro-batches; {} for a batch of one row."""
    return split_batch(config, next(_parts(config.batch_size), 1))


def split_batch(config: Config, parts: int) -> dict[str, Any]:
    """The same rows in a step, in micro-batches smaller by a factor of `parts`, a divisor of the batch
    size."""
    if parts == 1:
        return {}
    accumulation = config.gradient_accumulation_steps * parts
    change = {"batch_size": config.batch_size // parts, "gradient_accumulation_steps": accumulation}
    # The distance compares the rows of a micro-batch, so that a resumed run may not change them.
    return change | (_from_the_start(config) if config.lambda_sw > 0 else {})


def _from_the_start(config: Config) -> dict[str, Any]:
    """What a change that a resumed run refuses must come with."""
    named = config.resume_from_checkpoint
    may_resume = named is not None and (named != "auto" or bool(checkpoints(Path(config.output_dir))))
    return {"resume_from_checkpoint": None} if may_resume else {}
