"""Kill runs at random moments, most of them inside a save, until it is clear what their checkpoints are
worth.

    python tests/helpers/soak.py --kills 300               # so many in each engine, of forked processes
    python tests/helpers/soak.py --kills 20 --launchers  # every life through the real launchers

A run saves after every step, and every life of it ends by SIGKILL to all its process groups. After each kill:
every checkpoint that was announced (in train.log, or by its name) is whole and holds, bit by bit, what the
uninterrupted run held at that step, or it was the oldest beyond `save_total_limit`. The same command then
goes on, from the newest. A run that has reached its end is compared with the uninterrupted one, which the
real launcher has started: adapters, moments, step, position in the data, and the losses and learning rate of
every step.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launching import BIN, PLAIN
from lives import Life, Pace, Plan, Run, draw
from preloaded import environments, preload

from chorus.checkpoint.store import checkpoints, step_of, verify
from chorus.checkpoint.untrusted_files import Damaged
from chorus.config import on_resume
from chorus.config.section import OnResume
from chorus.errors import InputError

LIMIT = 3  # save_total_limit
KILLS_OF_A_TASK = 50
STEPS = 60  # what 50 lives come to

ENGINES = {
    "plain": ([*PLAIN], ("batch_size=4",)),
    "zero2": (
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", "train.py"],
        ("batch_size=2", "use_deepspeed=true"),
    ),
}
SETTINGS = (
    *(
        "num_agents=2",
        "lora_rank=2",
        "lora_target_modules=[q_proj, down_proj]",
        "dropconnect_p=0.1",
        "lambda_sw=0.2",
    ),
    *("eval_samples=0", "logging_steps=1", "save_steps=1", "num_warmup_steps_ratio=0.3"),
)


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
    pace: Pace = field(default_factory=Pace)
    lock: threading.Lock = field(default_factory=threading.Lock)


def run_in(place: Path, name: str, engine: str, steps: int, *more: str) -> Run:
    data = place / "rows.jsonl"
    if not data.exists():
        rows = ({"question": f"{n} + {n * n} =", "answer": f"{n + n * n}"} for n in range(43))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    launcher, settings = ENGINES[engine]
    common = (f"dataset_name={data}", f"max_train_steps={steps}", f"output_dir={place / name}", *SETTINGS)
    return Run(engine, place / name, launcher, [*common, *settings, *more])


# ---- what a run holds ----


def digest_of(checkpoint: Path) -> str:
    """Of adapters, moments, step, position in the data and all else but what may differ in a resumed run.

    Base, rows and tokenizer are in it by their fingerprints.
    """
    facts = json.loads((checkpoint / "state.json").read_text())
    facts.pop("initial_scores", None)  # they follow the evaluation's keys, which a resumed run may change
    facts["config"] = {
        key: facts["config"][key] for key in facts["config"] if on_resume(key) is OnResume.MUST_EQUAL
    }
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
        if "scores" not in row:  # they follow the evaluation's keys
            digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def uninterrupted(
    place: Path, engine: str, steps: int, forked: Sequence[Mapping[str, str]] = ()
) -> Uninterrupted:
    run = run_in(place, f"{engine}-uninterrupted", engine, steps, "save_total_limit=null")
    run = run._replace(forked=forked)
    code = Life(run, Pace()).until(None)
    assert code == 0, f"exit code {code}; {run.output}"
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


# ---- one life, and many ----


def one_life(run: Run, plan: Plan | None, truth: Uninterrupted, tally: Tally, announced: set[int]) -> bool:
    """Whether the run has reached its end."""
    life = Life(run, tally.pace)
    code = life.until(plan)
    before = set(announced)
    announced |= life.announced()
    faults = faults_after_a_kill(run, announced, truth)
    with tally.lock:
        tally.lost += len(faults)
        tally.announced += len(announced - before)
    if life.resumed_from() not in (None, life.newest):
        faults.append(f"{run.folder}: resumed from step {life.resumed_from()}, not from {life.newest}")
    if code is not None:
        if code != 0:
            faults.append(f"{run.folder}: exit code {code} without a kill; see {run.output}")
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


def soak(
    engine: str,
    forked: Sequence[Mapping[str, str]],
    place: Path,
    plans: Sequence[Plan],
    truth: Uninterrupted,
    tally: Tally,
) -> None:
    """Kill one run after the other as planned, and let the last one end."""
    plans, number = list(plans), 0
    while plans:
        number += 1
        run = run_in(place, f"{number}", engine, STEPS, f"save_total_limit={LIMIT}")._replace(forked=forked)
        announced: set[int] = set()
        while not one_life(run, plans[0] if plans else None, truth, tally, announced):
            plans.pop(0)
            with tally.lock:
                if sum(tally.kills.values()) % 10 == 0:
                    print(line_of(engine, tally), flush=True)
        shutil.rmtree(run.folder)


def line_of(engine: str, tally: Tally) -> str:
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(tally.kills.items()))
    return (
        f"{time.strftime('%H:%M:%S')}  {engine}: {sum(tally.kills.values())} kills ({phases}); "
        f"{tally.announced} checkpoints announced, {tally.lost} lost; {tally.finished} runs ended, all "
        f"equal: {not tally.faults}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=300, help="in each engine")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--launchers", action="store_true", help="start every life through the real launcher")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="chorus-soak-"))
    print(f"{options.kills} kills in each of {', '.join(options.engines)}, in {place}", flush=True)
    preload()
    forked = {
        engine: () if options.launchers else environments(ENGINES[engine][0]) for engine in options.engines
    }
    began, tallies = time.monotonic(), {engine: Tally() for engine in options.engines}
    with ThreadPoolExecutor(options.workers) as pool:
        truths = dict(
            zip(
                options.engines,
                pool.map(lambda engine: uninterrupted(place, engine, STEPS), tallies),
                strict=True,
            )
        )
        tasks = []
        for first in range(0, options.kills, KILLS_OF_A_TASK):
            for engine in reversed(options.engines):  # the slower one first
                rng = random.Random(f"{options.seed} {engine} {first}")
                plans = [draw(rng) for _ in range(min(KILLS_OF_A_TASK, options.kills - first))]
                own = place / f"{engine}-{first}"
                own.mkdir()
                tasks.append(
                    pool.submit(soak, engine, forked[engine], own, plans, truths[engine], tallies[engine])
                )
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
