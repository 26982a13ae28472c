"""Whether a run fits into memory, checked before the base is loaded; and errors if memory runs out."""

import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from chorus.collectives import on_first_process
from chorus.config import Config, RunConfig, as_settings
from chorus.data.samples import Sample, Samples
from chorus.errors import InputError, OutOfMemory, Preempted, RunError, out_of_memory
from chorus.monitoring.memory import memory_limit
from chorus.planning.auto_agents import machine_of
from chorus.planning.forecast import Machine, in_words
from chorus.planning.memory_forecast import forecast, longest_batch
from chorus.planning.way_out import smaller_batch, way_out
from chorus.progress import announced


@announced("forecasting the memory")
def foresee_memory(
    config: RunConfig,
    precision: str,
    accelerator: Accelerator,
    samples: Sequence[Sample],
    held_out: Sequence[Sample] = (),
) -> tuple[int, str]:
    """Forecast what the run takes of each device; a log level and one line for the log. A collective call.

    Loads nothing. With `memory_check: off` the log level is one that is never logged.

    Args:
        config: with a batch_size of no more rows than there are.
        samples, held_out: the rows of training and evaluation, of which the longest decides.

    Raises:
        InputError: with `memory_check: refuse`, where the forecast is more than what is free on some device.
    """
    if config.memory_check == "off":
        return logging.NOTSET, ""
    length = longest_of(config, samples, held_out)
    longest_row = max(_longest(config, part) for part in (samples, held_out))
    free = min(gather_object([memory_limit(accelerator.device, 1.0)]))
    needs, phase, way = on_first_process(
        accelerator,
        partial(
            *(_forecast_and_way_out, config, precision, machine_of(accelerator, config)),
            *(free, length, longest_row),
        ),
    )
    device = accelerator.device.type
    said = (
        f"by forecast {phase} needs {in_words(needs)} of each process's {device}, and {in_words(free)} "
        "are free"
    )
    said += " on the fullest" if accelerator.num_processes > 1 else ""
    if needs <= free:
        return logging.INFO, f"memory: {said}"
    if config.memory_check == "refuse":
        raise InputError(
            f"memory: {said}: it does not fit; {way} (memory_check=warn starts the run all the same, and "
            "dry_run_sanity_check.py shows the forecast part by part)"
        )
    return logging.WARNING, f"memory: {said}: it may not fit; {way}"


def longest_of(config: RunConfig, samples: Sequence[Sample], held_out: Sequence[Sample]) -> int:
    """T of the longest batch of these rows."""
    if config.packs or not samples:
        return longest_batch(config)
    tokens = max(_longest(config, part) for part in (samples, held_out)) - 1
    return -(-tokens // config.padding) * config.padding


def _longest(config: RunConfig, samples: Sequence[Sample]) -> int:
    if isinstance(samples, Samples):  # which has lengths without reading the tokens
        return int(samples.lengths.clip(max=config.max_seq_length).max(initial=1))
    return max((len(sample.ids) for sample in samples), default=1)


def _forecast_and_way_out(
    config: RunConfig, precision: str, machine: Machine, limit: int, length: int, longest_row: int
) -> tuple[int, str, str]:
    """Bytes, the phase that needs them, and a change that would make them fit ("" if they fit)."""
    log = logging.getLogger("chorus.model")
    before = log.level
    log.setLevel(logging.WARNING)  # its choices are logged when the real base is loaded
    told = forecast(config, precision, machine, length)
    way = ""
    if told.peak > limit:
        way = way_out(config, precision, machine, limit, length, longest_row, told)
    log.setLevel(before)
    return told.peak, "training" if told.training >= told.peak else "evaluation", way


@contextmanager
def memory_errors_named(config: Config) -> Iterator[None]:
    """Raise OutOfMemory, one line with a remedy, if memory of a GPU or the host runs out in this context."""
    try:
        yield
    except (InputError, RunError, Preempted):
        raise
    except Exception as error:
        found = out_of_memory(error)
        if found is None:
            raise
        place, phase = _where(error)
        raise OutOfMemory(
            f"process {os.environ.get('RANK', 0)}: out of memory in {phase}, at {place}: {found}; "
            f"{_remedy(config, phase)}; resume_from_checkpoint=auto resumes from the last checkpoint, if "
            "there is one"
        ) from error


def _where(error: BaseException) -> tuple[str, str]:
    """The innermost line of this package in the traceback, and the phase of the run."""
    frames = traceback.extract_tb(error.__traceback__)
    names = {"/".join(Path(frame.filename).parts[-2:]) for frame in frames}
    phase = "training"
    if any(name.startswith("ensemble/") for name in names):
        phase = "evaluation"
    elif "model/base.py" in names:
        phase = "loading the base"
    elif any(frame.name == "_capture" and frame.filename.endswith("cuda_graphs.py") for frame in frames):
        phase = "capturing a pass"
    ours = [frame for frame in frames if _is_ours(frame.filename)]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "an unknown place"
    return place, phase


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(Path(__file__).parents[1]) or Path(file).name == "train.py"


def _remedy(config: Config, phase: str) -> str:
    """Changes of this configuration that would save memory."""
    if phase == "loading the base":
        return "take a smaller base, mixed_precision=bf16, or end what else uses the device"
    if phase == "evaluation":
        smaller = (
            f"set eval_batch_size={max(1, config.eval_batch_size // 4)}" if config.eval_batch_size > 1 else ""
        )
        return " or ".join(
            filter(None, [smaller, "lower max_new_tokens_eval", "leave it out with eval_samples=0"])
        )
    changes: list[dict[str, Any]] = []
    if phase == "capturing a pass":
        changes.append({"cuda_graphs": False})
    if config.recomputation != "full":
        changes.append({"gradient_checkpointing": "full"})
    if config.parallel_mode != "sequential":
        changes.append({"parallel_mode": "sequential"})
    if config.batch_size > 1:
        changes.append(smaller_batch(config))
    told = [as_settings(change) for change in changes]
    return f"set {', or '.join(told)}" if told else "take a smaller max_seq_length, base or num_agents"
