"""Which trackers a run reports to, and what TensorBoard's own reader finds of it."""

from pathlib import Path
from typing import get_args

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from chorus.config.output import TrackerName
from chorus.errors import InputError
from chorus.monitoring import trackers as trackers_module
from chorus.monitoring.trackers import Trackers, decide_trackers


def test_the_names_are_accelerates():
    assert sorted(get_args(TrackerName)) == sorted(LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize(
    ("installed", "auto"), [(["wandb", "tensorboard"], ["tensorboard"]), (["wandb"], [])]
)
def test_auto_is_tensorboard_where_it_is_installed(
    installed: list[str], auto: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trackers_module, "get_available_trackers", lambda: installed)
    assert decide_trackers("auto") == auto
    assert decide_trackers("none") == []
    assert decide_trackers(["wandb"]) == ["wandb"]
    with pytest.raises(InputError, match="key 'report_to': mlflow is not installed; pip install mlflow"):
        decide_trackers(["wandb", "mlflow"])


def test_tensorboard_holds_every_number_by_step(tmp_path: Path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    PartialState()
    trackers = Trackers(["tensorboard"], tmp_path, {"lr": 0.5, "mode": "x"})
    for step, loss in ((1, 2.0), (4, 0.5)):
        trackers.log({"loss": loss}, step)
    trackers.close()
    found = reader.EventAccumulator(str(tmp_path / "chorus"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 2.0), (4, 0.5)]


def test_a_tracker_that_does_not_start_is_the_users_to_mend_in_one_line(tmp_path: Path):
    class NotLoggedIn(GeneralTracker):
        name, requires_logging_directory = "wandb", False

        @property
        def tracker(self) -> None:
            return None

        def start(self) -> None:
            raise RuntimeError("api_key not configured\nrun login")

    with pytest.raises(
        InputError, match=r"does not start: api_key not configured run login; or leave it out"
    ) as error:
        Trackers([NotLoggedIn()], tmp_path, {})
    assert "\n" not in str(error.value)
