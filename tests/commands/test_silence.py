"""No silence: what a command imports is announced before its seconds pass."""

import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from chorus import progress
from chorus.errors import InputError

TIMER = threading.Timer
EMPTY = "an empty folder"


class Timers:
    """Stands for threading.Timer, and keeps what would be said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, seconds: float, function: Callable[[str], None], args: list[str]) -> threading.Timer:
        self.lines += args
        return TIMER(seconds, function, args)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("generate", [EMPTY, "a question"]),
        ("chat", [EMPTY]),
        ("serve", [EMPTY, "--port", "0"]),
        ("ask", ["http://127.0.0.1:1", "a question", "--end", "<eos>", "--timeout", "1"]),
        ("evaluate", [EMPTY, "--data", "none.jsonl"]),
        # A folder that is not there is refused before the harness lists its own tasks, which takes long.
        ("harness", [EMPTY, "--tasks", "none", "--include_path", "gone"]),
        ("export", [EMPTY, "none/out"]),
    ],
)
def test_a_command_says_that_it_imports(
    command: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    timers = Timers()
    monkeypatch.setattr(progress.threading, "Timer", timers)
    with pytest.raises(InputError):
        import_module(f"chorus.commands.{command}").main(
            [str(tmp_path) if one == EMPTY else one for one in arguments]
        )
    assert timers.lines[0] == f"{progress.IMPORTING} ..."
