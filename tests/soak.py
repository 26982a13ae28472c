"""Kill runs at random moments, most of them inside a save, until it is clear what their checkpoints are worth.

    python tests/soak.py --kills 300        # `make soak`: so many in each engine, through the real launchers

A run saves after every step, and every life of it ends by SIGKILL to the process groups of the launcher and of what it
started. After each kill: every checkpoint that was announced (in train.log, or by its name in the folder) is whole and
holds, bit by bit, what the uninterrupted run held at that step, or it was the oldest beyond `save_total_limit`. The
same command then goes on, from the newest. A run that has reached its end is compared with the uninterrupted one:
adapters, moments, step, position in the data, and the losses and learning rate of every step.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from launching import BIN, PLAIN, ROOT, environment

from chorus.checkpoint import HALF_DONE, Damaged, checkpoints, step_of, verify
from chorus.errors import InputError

LIMIT = 3  # save_total_limit
KILLS_OF_A_TASK = 50
STEPS = 60  # what 50 lives come to
PATIENCE_S = 900.0  # a life that shows nothing for so long has failed

ENGINES = {
    "plain": ([*PLAIN], ("batch_size=4",)),
    "zero2": (
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", "train.py"],
        ("batch_size=2", "use_deepspeed=true"),
    ),
}
SETTINGS = (
    *("num_agents=2", "lora_rank=2", "lora_target_modules=[q_proj, down_proj]", "dropconnect_p=0.1", "lambda_sw=0.2"),
    *("eval_samples=0", "logging_steps=1", "save_steps=1", "num_warmup_steps_ratio=0.3"),
)


class Plan(NamedTuple):
    """Kill a life after the `count`-th "save" of it has begun, or "step" to be saved has, or "start" of the program.

    fraction: how far into it, by what it usually takes.
    """

    moment: str
    count: int
    fraction: float


def draw(rng: random.Random) -> Plan:
    (moment,) = rng.choices(["save", "step", "start"], [75, 20, 5])
    return Plan(moment, rng.randint(1, 3), 1.1 * rng.random())


class Run(NamedTuple):
    """One output folder, and the command that starts or resumes the run in it."""

    engine: str
    folder: Path
    command: Sequence[str]


class Uninterrupted(NamedTuple):
    """What a run holds after each step, and at its end."""

    by_step: Mapping[int, str]
    end: str


@dataclass
class Tally:
    """What has been seen of one engine. Several threads add to it."""

    kills: Counter[str] = field(default_factory=Counter)
    announced: int = 0
    finished: int = 0
    faults: list[str] = field(default_factory=list)
    lost: int = 0
    durations: dict[str, deque[float]] = field(
        default_factory=lambda: {
            "save": deque([0.1], maxlen=30),
            "step": deque([0.1], maxlen=30),
            "start": deque([8.0], maxlen=30),
        }
    )
    lock: threading.Lock = field(default_factory=threading.Lock)


def run_in(place: Path, name: str, engine: str, steps: int, *more: str) -> Run:
    data = place / "rows.jsonl"
    if not data.exists():
        rows = ({"question": f"{n} + {n * n} =", "answer": f"{n + n * n}"} for n in range(43))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    launcher, settings = ENGINES[engine]
    common = (f"dataset_name={data}", f"max_train_steps={steps}", f"output_dir={place / name}", *SETTINGS)
    return Run(engine, place / name, [*launcher, *common, *settings, *more])


# ---- what a run holds ----


def digest_of(checkpoint: Path) -> str:
    """Of adapters, moments, step, position in the data and all else, but for what may differ between two folders."""
    facts = json.loads((checkpoint / "state.json").read_text())
    facts["config"] = {key: facts["config"][key] for key in facts["config"].keys() - {"output_dir", "save_total_limit"}}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name not in ("state.json", "MANIFEST.json"):
            digest.update(f"{file.relative_to(checkpoint)} ".encode() + file.read_bytes())
    return digest.hexdigest()


def digest_of_end(folder: Path) -> str:
    """Of the last checkpoint, the exported agents, and losses and learning rate of every step."""
    digest = hashlib.sha256(digest_of(checkpoints(folder)[0]).encode())
    for file in sorted((folder / "agents").rglob("*.safetensors")):
        digest.update(file.read_bytes())
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = {key: value for key, value in json.loads(line).items() if key != "agent_tokens_per_second"}
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def uninterrupted(place: Path, engine: str, steps: int) -> Uninterrupted:
    run = run_in(place, f"{engine}-uninterrupted", engine, steps, "save_total_limit=null")
    code = start(run).wait(timeout=PATIENCE_S)
    assert code == 0, f"exit code {code}; {run.folder}.log"
    by_step = {step_of(folder): digest_of(folder) for folder in checkpoints(run.folder)}
    assert sorted(by_step) == list(range(1, steps + 1))
    return Uninterrupted(by_step, digest_of_end(run.folder))


def faults_after_a_kill(run: Run, announced: set[int], truth: Uninterrupted) -> list[str]:
    """Each checkpoint that is damaged, holds something else than it should, or is gone before its time."""
    found = {step_of(folder): folder for folder in checkpoints(run.folder)}
    faults = []
    for step, folder in found.items():
        try:
            verify(folder)
        except (Damaged, InputError) as error:
            faults.append(str(error))
        else:
            if digest_of(folder) != truth.by_step[step]:
                faults.append(f"{folder}: is whole, but not what the uninterrupted run held")
    kept = sorted(announced | found.keys(), reverse=True)[:LIMIT]
    faults += [f"{run.folder}: step {step} was announced and is gone" for step in kept if step not in found]
    return faults


# ---- one life ----


def start(run: Run) -> subprocess.Popen:
    with Path(f"{run.folder}.log").open("a") as log:
        mark = environment(CHORUS_SOAK=str(run.folder))
        return subprocess.Popen(run.command, cwd=ROOT, env=mark, stdout=log, stderr=log, start_new_session=True)


def groups_of(run: Run) -> list[int]:
    """The process groups of all that has this run's mark: torchrun gives every worker one of its own."""
    mark, groups = f"CHORUS_SOAK={run.folder}\0".encode(), set()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environ.read_bytes():
                groups.add(os.getpgid(int(environ.parent.name)))
        except OSError:  # it has ended meanwhile
            continue
    return sorted(groups)


def kill(run: Run, groups: list[int], process: subprocess.Popen) -> None:
    """SIGKILL to every process group, and wait until nothing is left of them."""
    while groups:
        for group in groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.poll()
        groups = groups_of(run)
    process.wait()


def entries(run: Run) -> dict[str, int]:
    """Name and time of change of each folder in `checkpoints/`."""
    try:
        with os.scandir(run.folder / "checkpoints") as found:
            return {entry.name: entry.stat().st_ctime_ns for entry in found}
    except FileNotFoundError:  # also one that was renamed while we looked
        return {}


class Life:
    """From a start of the run to its kill, or to its end. It looks at the folder alone, as any onlooker could."""

    def __init__(self, run: Run, tally: Tally):
        self.run, self.tally = run, tally
        self.found = entries(run)  # what earlier lives have left
        self.newest = max((step_of(folder) for folder in checkpoints(run.folder)), default=0)
        self.log_file = run.folder / "train.log"
        self.log_offset = self.log_file.stat().st_size if self.log_file.exists() else 0
        self.begun: dict[int, float] = {}  # saves, and when they were seen
        self.done: dict[int, float] = {}
        self.started = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        for name, changed in entries(self.run).items():
            step = int("".join(filter(str.isdigit, name)) or 0)
            if name.endswith(HALF_DONE) and self.found.get(name) != changed and step > max(self.done, default=0):
                if step > self.newest and step not in self.begun:
                    self.begun[step] = now
                    since = self.done.get(step - 1)
                    self._took("start" if not self.done else "step", self.started if since is None else since, now)
            elif not name.endswith(HALF_DONE) and step > self.newest and step not in self.done:
                self.done[step] = now
                if step in self.begun:
                    self._took("save", self.begun[step], now)

    def _took(self, what: str, since: float, now: float) -> None:
        with self.tally.lock:
            self.tally.durations[what].append(now - since)

    def usually(self, what: str) -> float:
        with self.tally.lock:
            return statistics.median(self.tally.durations[what])

    def until(self, plan: Plan | None) -> int | None:
        """Let it live until it is to be killed; its exit code where it has ended before."""
        process, moment = start(self.run), None
        groups: list[int] = []
        while (code := process.poll()) is None and (moment is None or time.monotonic() < moment):
            self.look()
            if moment is None and plan is not None and self._has_come(plan):
                moment = time.monotonic() + plan.fraction * self.usually(plan.moment)
                groups = groups_of(self.run)
            assert time.monotonic() < self.started + PATIENCE_S, f"nothing happens; see {self.run.folder}.log"
            time.sleep(0.001 if self.begun else 0.004)
        if code is None:
            kill(self.run, groups or groups_of(self.run), process)
        return code

    def _has_come(self, plan: Plan) -> bool:
        if plan.moment == "start":
            return True
        return len(self.begun if plan.moment == "save" else self.done) >= plan.count

    def said(self) -> str:
        if not self.log_file.exists():
            return ""
        with self.log_file.open() as log:
            log.seek(self.log_offset)
            return log.read()

    def announced(self) -> set[int]:
        self.look()
        return {int(step) for step in re.findall(r"saved \S+/step_(\d+)\n", self.said())} | self.done.keys()

    def phase(self) -> str:
        """Where the kill has hit, by what lies on the disk."""
        newest = max(self.done, default=self.newest)
        for name, changed in entries(self.run).items():
            if name.endswith(HALF_DONE) and self.found.get(name) != changed:
                return "in a save" if int(name[5 : -len(HALF_DONE)]) > newest else "in pruning"
        if self.done and f"step_{newest:06d}\n" not in self.said():
            return "in a save"  # renamed, and not yet said
        return "in training" if " steps\n" in self.said() else "at the start"


def one_life(run: Run, plan: Plan | None, truth: Uninterrupted, tally: Tally, announced: set[int]) -> bool:
    """Whether the run has reached its end."""
    life = Life(run, tally)
    code = life.until(plan)
    before = set(announced)
    announced |= life.announced()
    faults = faults_after_a_kill(run, announced, truth)
    with tally.lock:
        tally.lost += len(faults)
        tally.announced += len(announced - before)
    going_on = re.search(r"going on from \S+/step_(\d+),", life.said())
    if (int(going_on[1]) if going_on else 0) != life.newest and "rows," in life.said():
        faults.append(f"{run.folder}: went on from {going_on and going_on[1]}, not from step {life.newest}")
    if code is not None:
        if code != 0:
            faults.append(f"{run.folder}: exit code {code} without a kill; see {run.folder}.log")
        elif digest_of_end(run.folder) != truth.end:
            faults.append(f"{run.folder}: its end is not that of the uninterrupted run")
    with tally.lock:
        tally.faults += faults
        if code is None:
            tally.kills[life.phase()] += 1
        else:
            tally.finished += 1
    if faults:
        raise RuntimeError("\n".join(faults))
    return code is not None


# ---- many ----


def soak(engine: str, place: Path, kills: int, steps: int, seed: Any, truth: Uninterrupted, tally: Tally) -> None:
    """Spend so many kills on one run after the other, and let the last one end."""
    rng = random.Random(f"{seed} {engine}")
    number = 0
    while kills > 0:
        number += 1
        run = run_in(place, f"{engine}-{seed}-{number}", engine, steps, f"save_total_limit={LIMIT}")
        announced: set[int] = set()
        while not one_life(run, draw(rng) if kills > 0 else None, truth, tally, announced):
            kills -= 1
            with tally.lock:
                if sum(tally.kills.values()) % 10 == 0:
                    print(line_of(engine, tally), flush=True)
        shutil.rmtree(run.folder)


def line_of(engine: str, tally: Tally) -> str:
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(tally.kills.items()))
    return (
        f"{time.strftime('%H:%M:%S')}  {engine}: {sum(tally.kills.values())} kills ({phases}); {tally.announced} "
        f"checkpoints announced, {tally.lost} lost; {tally.finished} runs ended, all equal: {not tally.faults}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=300, help="in each engine")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="chorus-soak-"))
    print(f"{options.kills} kills in each of {', '.join(options.engines)}, in {place}", flush=True)
    began, tallies = time.monotonic(), {engine: Tally() for engine in options.engines}
    with ThreadPoolExecutor(options.workers) as pool:
        truths = dict(
            zip(options.engines, pool.map(lambda engine: uninterrupted(place, engine, STEPS), tallies), strict=True)
        )
        shares = [
            (engine, first, min(KILLS_OF_A_TASK, options.kills - first))
            for first in range(0, options.kills, KILLS_OF_A_TASK)
            for engine in reversed(options.engines)  # the slower one first
        ]
        tasks = [
            pool.submit(soak, engine, place, kills, STEPS, options.seed + first, truths[engine], tallies[engine])
            for engine, first, kills in shares
        ]
        broken = [task.exception() for task in tasks]
    print(f"\nafter {(time.monotonic() - began) / 60:.0f} minutes, {options.workers} runs at a time:")
    for engine, tally in tallies.items():
        print(line_of(engine, tally))
    for error in filter(None, broken):
        print(f"FAILED: {error}")
    if any(broken):
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
