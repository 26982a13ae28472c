"""Experiment trackers of Accelerate: TensorBoard, Weights & Biases and others. Only on the first process."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from chorus.config.output import TrackerName
from chorus.errors import InputError

logger = logging.getLogger(__name__)

PROJECT = "chorus"
REFUSED_BY_MLFLOW = re.compile(r"[^\w\-. :/]")  # such as the @ of Risk@80Cov
Plain = bool | int | float | str


def decide_trackers(report_to: Literal["auto", "none"] | Sequence[TrackerName]) -> list[TrackerName]:
    """The trackers of a run, with "auto" decided: TensorBoard where it is installed.

    Raises:
        InputError: the library of a tracker is not installed.
    """
    installed = [str(name) for name in get_available_trackers()]
    if report_to == "none":
        return []
    if report_to == "auto":
        return ["tensorboard"] if "tensorboard" in installed else []
    for name in report_to:
        if name not in installed:
            raise InputError(f"key 'report_to': {name} is not installed; pip install {name}, or leave it out")
    return list(report_to)


class Trackers:
    """The trackers of a run. They get the settings at the start, then numbers by name.

    Args:
        report_to: names, or tracker objects.
        output_dir: where those that write files write them.

    Raises:
        InputError: a tracker does not start, for example because nobody is logged in.
    """

    def __init__(
        self, report_to: Sequence[str | GeneralTracker], output_dir: Path, settings: Mapping[str, Plain]
    ):
        self._trackers: list[GeneralTracker] = []
        for given in report_to:
            name = given if isinstance(given, str) else type(given).__name__
            try:
                tracker = _tracker(given, output_dir) if isinstance(given, str) else given
                tracker.start()
                tracker.store_init_configuration(dict(settings))
            except (
                Exception
            ) as error:  # each library raises its own errors, and the other processes are waiting
                line = " ".join(str(error).split()).rstrip(".")
                raise InputError(
                    f"key 'report_to': {name} does not start: {line}; or leave it out"
                ) from error
            self._trackers.append(tracker)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers to every tracker. One that fails is dropped with a warning: an unreachable server must
        not end a run. A full disk ends it, as for the run's own files.

        Raises:
            OSError: a tracker could not write its file.
        """
        for tracker in list(self._trackers):
            names = {_name(tracker, name): value for name, value in numbers.items()}
            self._attempt(tracker, lambda tracker=tracker, names=names: tracker.log(names, step=step))

    def close(self) -> None:
        for tracker in list(self._trackers):
            self._attempt(tracker, tracker.finish)

    def _attempt(self, tracker: GeneralTracker, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError:
            raise
        except Exception as error:  # each library raises its own errors
            self._trackers.remove(tracker)
            logger.warning(
                "%s failed and gets no more numbers: %s", _label(tracker), " ".join(str(error).split())
            )

    def abandon(self) -> None:
        """Drop the trackers without closing them: their output would hide the error that ends the run."""
        self._trackers.clear()


def _label(tracker: GeneralTracker) -> str:
    return getattr(
        tracker, "name", type(tracker).__name__
    )  # an undeclared attribute of Accelerate's trackers


def _name(tracker: GeneralTracker, name: str) -> str:
    return REFUSED_BY_MLFLOW.sub("_", name) if _label(tracker) == "mlflow" else name


def _tracker(name: str, output_dir: Path) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "wandb" and "WANDB_DIR" not in os.environ:  # its default is the working directory
        return kind(PROJECT, dir=str(output_dir))
    return kind(PROJECT, str(output_dir)) if kind.requires_logging_directory else kind(PROJECT)
