"""Experiment trackers, as Accelerate has them: TensorBoard,
Weights & Biases and others. The first process alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from chorus.config.output import TrackerName
from chorus.errors import InputError

PROJECT = "chorus"
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
    """The trackers of a run. They get the settings at the start and numbers by name after that.

    Args:
        report_to: names, or trackers that are already made.
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
            except Exception as error:  # each library has its own errors, and the other processes are waiting
                line = " ".join(str(error).split())
                raise InputError(
                    f"key 'report_to': {name} does not start: {line}; or leave it out"
                ) from error
            self._trackers.append(tracker)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.log(dict(numbers), step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def abandon(self) -> None:
        """Drop the trackers without their last words: they would hide the error that ends the run."""
        self._trackers.clear()


def _tracker(name: str, output_dir: Path) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    return kind(PROJECT, str(output_dir)) if kind.requires_logging_directory else kind(PROJECT)
