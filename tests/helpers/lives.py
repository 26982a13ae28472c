"""Lives of a run: each from a start to a kill at a moment that is drawn, or to the run's end."""

import os
import random
import re
import signal
import statistics
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from launching import PATIENCE_S, ROOT, environment
from preloaded import Workers

from chorus.checkpoint.store import HALF_DONE, checkpoints, step_of


class Plan(NamedTuple):
    """When to strike: in the `number`-th "save" of a life, in the "step" after that save, at the "start" of
    the program, in the "first step", or in the "evaluation" at the end.

    fraction: how far into it, by what it usually takes.
    """

    moment: str
    number: int
    fraction: float


def draw(rng: random.Random) -> Plan:
    (moment,) = rng.choices(["save", "step", "start"], [80, 15, 5])
    return Plan(moment, rng.randint(1, 3), 1.1 * rng.random())


class Run(NamedTuple):
    """One output folder, and how the run in it is started or resumed.

    forked: the environment of each process, where they are forked and not started by the launcher.
    """

    engine: str
    folder: Path
    launcher: Sequence[str]
    settings: Sequence[str]
    forked: Sequence[Mapping[str, str]] = ()

    @property
    def output(self) -> Path:
        """What its processes print; by this they are found."""
        return Path(f"{self.folder}.log")


class Pace:
    """How long a save, the step after it and a start take of late: the median, in seconds."""

    def __init__(self) -> None:
        first_guess = {"save": 0.1, "step": 0.1, "start": 8.0, "first step": 0.5, "evaluation": 0.2}
        self._durations = {what: deque([seconds], maxlen=30) for what, seconds in first_guess.items()}
        self._lock = threading.Lock()

    def took(self, what: str, seconds: float) -> None:
        with self._lock:
            self._durations[what].append(seconds)

    def usually(self, what: str) -> float:
        with self._lock:
            return statistics.median(self._durations[what])


def start(run: Run) -> subprocess.Popen | Workers:
    if run.forked:
        return Workers(run.forked, run.settings, run.output)
    with run.output.open("a") as log:
        command = [*run.launcher, *run.settings]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
        )


def processes_of(run: Run) -> list[int]:
    """Whatever session or group they moved to."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if os.readlink(output) == str(run.output):
                found.append(int(output.parts[2]))
        except OSError:  # it has ended meanwhile
            continue
    return sorted(found)


def groups_of(run: Run) -> list[int]:
    """Their process groups: torchrun gives every worker one of its own."""
    groups = set()
    for process in processes_of(run):
        with suppress(ProcessLookupError):
            groups.add(os.getpgid(process))
    return sorted(groups)


def worker_of(run: Run, local_rank: int) -> int:
    """The process that trains as this rank, and none of its DataLoader's."""
    mark = f"\0LOCAL_RANK={local_rank}\0".encode()
    # The first of them: the others are its children.
    return next(pid for pid in processes_of(run) if mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())


def kill(run: Run, groups: Sequence[int], process: subprocess.Popen | Workers) -> None:
    """SIGKILL to every process group, until nothing is left of them, nor anything under way to them."""
    while groups or process.poll() is None:
        for group in groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        process.poll()
        groups = groups_of(run)


def entries(run: Run) -> dict[str, int]:
    """Name and time of change of each folder in `checkpoints/`."""
    try:
        with os.scandir(run.folder / "checkpoints") as found:
            return {entry.name: entry.stat().st_ctime_ns for entry in found}
    except FileNotFoundError:  # also one that was renamed while we looked
        return {}


Strike = Callable[[Run, list[int], Any], None]


class Life:
    """From a start of the run to its kill, or to its end. It
    looks at nothing but the output folder."""

    def __init__(self, run: Run, pace: Pace):
        self.run, self.pace = run, pace
        self.found = entries(run)  # left by earlier lives
        self.newest = max((step_of(folder) for folder in checkpoints(run.folder)), default=0)
        self.log_file = run.folder / "train.log"
        self.log_offset = self._log_size()
        self.begun: dict[int, float] = {}  # saves, and when they were first seen
        self.done: dict[int, float] = {}
        self.started = time.monotonic()

    def until(self, plan: Plan | None, strike: Strike = kill) -> int | None:
        """Let it live until it is to be struck; its exit code, None
        where it was struck. Nothing is left of it then."""
        process, moment, groups = start(self.run), None, []
        try:
            while process.poll() is None and (moment is None or time.monotonic() < moment):
                self.look()
                if not groups and self._log_size() > self.log_offset:
                    groups = groups_of(
                        self.run
                    )  # looked up before it is urgent; by now every process is there
                if moment is None and plan is not None and self._has_come(plan):
                    moment = time.monotonic() + plan.fraction * self.pace.usually(plan.moment)
                assert time.monotonic() < self.started + PATIENCE_S, f"nothing happens; see {self.run.output}"
                time.sleep(0.001 if self.begun else 0.004)
            code = process.poll()
            if code is None:
                strike(self.run, groups or groups_of(self.run), process)
            return code
        finally:
            kill(self.run, groups_of(self.run), process)

    def look(self) -> None:
        now = time.monotonic()
        for name, changed in entries(self.run).items():
            if not name.startswith("step_"):
                continue
            step = int(name.removesuffix(HALF_DONE).removeprefix("step_"))
            is_half_done, is_new = name.endswith(HALF_DONE), step > max(self.done, default=self.newest)
            if is_half_done and is_new and step not in self.begun and self.found.get(name) != changed:
                self.begun[step] = now
                if step - 1 in self.done:
                    self.pace.took("step", now - self.done[step - 1])
                elif not self.done:
                    self.pace.took("start", now - self.started)
            elif not is_half_done and is_new:
                self.done[step] = now
                if step in self.begun:
                    self.pace.took("save", now - self.begun[step])

    def announced(self) -> set[int]:
        """Steps whose checkpoints it has said were saved, or that were seen under their final names."""
        self.look()
        return {int(step) for step in re.findall(r"saved \S+/step_(\d+)\n", self.said())} | self.done.keys()

    def resumed_from(self) -> int | None:
        """The step from which it resumed, by its log; 0 for a fresh start, None before training."""
        if not self._came_to_training():
            return None
        from_step = re.search(r"resuming from \S+/step_(\d+),", self.said())
        return int(from_step[1]) if from_step else 0

    def phase(self) -> str:
        """Where the kill has hit, by what lies on the disk."""
        newest = max(self.done, default=self.newest)
        for name, changed in entries(self.run).items():
            if name.endswith(HALF_DONE) and self.found.get(name) != changed:
                return "in a save" if int(name[5 : -len(HALF_DONE)]) > newest else "in pruning"
        if self.done and f"step_{newest:06d}\n" not in self.said():
            return "in a save"  # renamed, and not yet said
        return "in training" if self._came_to_training() else "at the start"

    def said(self) -> str:
        """What it has added to train.log."""
        if not self.log_file.exists():
            return ""
        with self.log_file.open() as log:
            log.seek(self.log_offset)
            return log.read()

    def _log_size(self) -> int:
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def _came_to_training(self) -> bool:
        return re.search(r"\d+ rows, \d+ steps\n", self.said()) is not None

    def _has_come(self, plan: Plan) -> bool:
        match plan.moment:
            case "start":
                return True
            case "first step":
                return self._came_to_training()
            case "evaluation":
                return (self.run.folder / "agents").exists()
        return len(self.begun if plan.moment == "save" else self.done) >= plan.number
