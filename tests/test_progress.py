"""What is said of work that takes its time."""

import logging
import threading

import pytest

from chorus import progress
from chorus.progress import announced, say


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.any = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.any.set()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    handler = Said()
    monkeypatch.setattr(logging.getLogger("chorus"), "handlers", [handler])
    monkeypatch.setattr(logging.getLogger("chorus"), "level", logging.INFO)
    return handler


def test_what_takes_longer_is_said_while_it_is_under_way(said: Said, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.01)

    @announced("loading the base")
    def load() -> int:
        assert said.any.wait(60)
        return 3

    assert load() == 3
    assert said.lines == ["loading the base ..."]


def test_what_is_done_at_once_is_not(said: Said, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 1e6)
    before = threading.active_count()
    with announced("loading the base"):
        pass
    with pytest.raises(ValueError, match="ours"), announced("loading the base"):
        raise ValueError("ours")
    while threading.active_count() > before:  # a cancelled timer ends as soon as it is scheduled
        pass
    assert not said.lines


@pytest.mark.parametrize(("rank", "expected"), [(None, "line\n"), ("0", "line\n"), ("1", "")])
def test_the_first_process_alone_says_it_on_stderr_until_the_log_is_open(
    rank: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(logging.getLogger("chorus"), "handlers", [])
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    say("line")
    assert capsys.readouterr().err == expected
