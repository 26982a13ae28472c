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


class Remembering(GeneralTracker):
    """A tracker of the user's own."""

    requires_logging_directory = False

    def __init__(self, name: str, fails: Exception | None = None):
        self.name, self.fails = name, fails  # pyright: ignore[reportIncompatibleVariableOverride]
        self.rows: list[dict[str, float]] = []

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict) -> None:
        pass

    def log(self, values: dict, step: int | None, **kwargs: object) -> None:
        if self.fails is not None:
            raise self.fails
        self.rows.append(values)


def test_a_tracker_that_fails_is_left_out_with_a_warning_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    PartialState()
    lost, kept = Remembering("wandb", RuntimeError("no answer\nfrom the server")), Remembering("other")
    trackers = Trackers([lost, kept], tmp_path, {})
    for step in (1, 2):
        trackers.log({"loss": 2.0}, step)
    trackers.close()
    assert kept.rows == [{"loss": 2.0}] * 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "wandb failed and gets no more numbers: no answer from the server"


def test_a_full_disk_under_a_tracker_ends_the_run(tmp_path: Path):
    PartialState()
    trackers = Trackers([Remembering("tensorboard", OSError(28, "No space left"))], tmp_path, {})
    with pytest.raises(OSError, match="No space left"):
        trackers.log({"loss": 2.0}, 1)


def test_mlflow_gets_names_that_it_takes(tmp_path: Path):
    PartialState()
    mlflow, other = Remembering("mlflow"), Remembering("wandb")
    trackers = Trackers([mlflow, other], tmp_path, {})
    trackers.log({"eval/base/sc/Risk@80Cov/max_p": 0.5}, 1)
    assert mlflow.rows == [{"eval/base/sc/Risk_80Cov/max_p": 0.5}]
    assert other.rows == [{"eval/base/sc/Risk@80Cov/max_p": 0.5}]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_real_tracker_takes_every_name_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for key, value in {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
    }.items():
        monkeypatch.setenv(key, value)
    pytest.importorskip(name)  # trackio reads its folder while it is imported
    PartialState()
    trackers = Trackers([name], tmp_path, {"lr": 0.5, "mode": "x"})
    trackers.log({"loss": 2.0, "eval/mixture/sc/Risk@80Cov/max_p": 0.5}, 1)
    trackers.close()
    assert not caplog.records
    assert any(tmp_path.iterdir())
