"""Is an ensemble worth it? Chorus beside one LoRA and other ways to spend the same compute, on one base.

    python benchmarks/quality.py                                         # the bundled base and task
    python benchmarks/quality.py --model FOLDER --task clinc150=train.jsonl,val.jsonl,test.jsonl,oos.jsonl
    python benchmarks/quality.py --list                                  # the arms, and which are measured

Each arm's learning rate, number of epochs, rank and strength are chosen on tuning rows first, by the NLL at a
fitted temperature; then it is trained with `--seeds` seeds and scored on test rows, once. All arms share one
process and one base, and the shapes of a run are few, so that layers are compiled a few times in all.
quality_arms.py lists the arms, quality_tasks.py says which rows are used for what.

Writes quality.json, quality.md and a picture of each task to --out, anew after every run; what is measured
already is not measured again, so a study may be cut into many calls. --minutes ends it: no run is started
that would not end in time. On several GPUs, each may take some of the arms (--arms) into a folder of its
own; runs that shared a GPU or a busy host are timed again alone (--time-again).
"""

import argparse
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # train.py

import timing
import torch
from conditions import conditions
from pydantic import ValidationError
from quality_arms import Arm, Settings, arms, combined_arms
from quality_options import arguments
from quality_page import page
from quality_pictures import draw_pictures
from quality_runs import Bench, Committee, Trained, calibrated_nll, scored, train_agents
from quality_stock import stock_ms_per_step
from quality_tasks import Sizes, TaskRows, read_task
from results import Results, Row

from chorus.config import RunConfig
from chorus.errors import InputError, RunError, input_errors_end_the_program
from chorus.model.base import load_base, load_tokenizer
from chorus.model.execution import decide_execution
from chorus.model.regularisation import draw_keep_masks
from chorus.monitoring.run_log import quiet_libraries
from chorus.training.engine import DTYPES, decide_precision, make_accelerator

TUNING_SEED = 1_000  # unlike those of the seeds that are scored
TIMED_STEPS = 24  # of a run that is only timed
STOCK = Arm("stock PEFT")


class Chosen(NamedTuple):
    """What tuning chose for an arm, and its NLL of the tuning rows."""

    rate: float
    epochs: int
    variant: Settings
    nll: float


class OutOfTime(Exception):
    """The next run would not end in time."""


class Study:
    """The arms of one task: tuned, trained and scored, one after the other."""

    def __init__(self, bench: Bench, results: Results, options: argparse.Namespace, end: float) -> None:
        self.bench, self.results, self.options, self.end = bench, results, options, end
        self.ms_per_agent = self.other_s = 0.0  # of a step, and beside the steps; the slowest run so far
        device = bench.accelerator.device
        self.about = conditions(device, DTYPES[decide_precision("auto")])

    def row(self, kind: str, arm: Arm, **more: Any) -> Row:
        where = {"base": Path(self.options.model).name, "task": self.bench.rows.name}
        return {"kind": kind, **where, "arm": arm.name, "size": arm.size, **more}

    def rank(self, arm: Arm, variant: Settings) -> int:
        return {**arm.settings, **variant}.get("lora_rank", self.options.rank)

    # ---- tuning

    def tuning_rows(self, arm: Arm) -> list[Row]:
        """What is to be tried: each with all rates."""
        numbers = self.options.epochs
        if arm.epochs_of is not None and (other := self.chosen(arm.epochs_of)) is not None:
            numbers = [arm.longer * other.epochs]
        return [
            self.row("tuning", arm, epochs=epochs, variant=dict(variant))
            for epochs in numbers
            for variant in arm.variants
        ]

    def chosen(self, name: str) -> Chosen | None:
        """The best of what was tried of an arm on this task."""
        wanted = ("tuning", Path(self.options.model).name, self.bench.rows.name, name)
        found = [
            Chosen(rate, row["epochs"], row["variant"], nll)
            for row in self.results.rows
            if (row["kind"], row["base"], row["task"], row["arm"]) == wanted
            for rate, nll in zip(row.get("rates", ()), row.get("nll", ()), strict=True)
            if nll == nll
        ]
        return min(found, key=lambda one: one.nll, default=None)

    def tune(self, arm: Arm) -> Chosen:
        if arm.tuned_as is not None and (other := self.chosen(arm.tuned_as)) is not None:
            return other
        for row in self.tuning_rows(arm):
            if not self.results.is_measured(row):
                self.keep(row, lambda row=row: self.tried(arm, row["epochs"], row["variant"]))
        chosen = self.chosen(arm.name)
        if chosen is None:
            raise RunError(f"{arm.name}: nothing that was tried could be trained")
        return chosen

    def tried(self, arm: Arm, epochs: int, variant: Settings) -> Row:
        """Each rate's NLL of the tuning rows, with one seed."""
        rates = self.options.rates
        together = not arm.is_coupled(variant) and arm.agents * len(rates) <= self.options.most_agents
        nll, accuracy, loss, seconds = [], [], [], 0.0
        for group in [rates] if together else [[rate] for rate in rates]:
            trained = self.train(arm, variant, group, epochs, TUNING_SEED)
            seconds += trained.seconds
            for place in range(len(group)):
                members = self.committee(arm, variant, trained, place)
                of_mixture = calibrated_nll(self.bench, members, self.rank(arm, variant))
                nll.append(of_mixture[0])
                accuracy.append(of_mixture[1])
            loss.append(trained.loss)
        return {"rates": rates, "nll": nll, "accuracy": accuracy, "training_loss": loss, "wall_s": seconds}

    # ---- runs

    def train(
        self, arm: Arm, variant: Settings, rates: Sequence[float], epochs: int, seed: int, steps: int = 0
    ) -> Trained:
        """A run of this arm's agents, once for each of the rates, side by side.

        Raises:
            OutOfTime: it would not end in time, by the slowest run so far.
        """
        num_steps = steps or self.bench.steps(epochs)
        lr = [own for rate in rates for own in arm.rates(rate)]
        expected = self.ms_per_agent * len(lr) * num_steps / 1000 + self.other_s
        if time.monotonic() + expected > self.end:
            raise OutOfTime
        settings = {"lambda_sw": 0.0, **arm.settings, **variant, "num_agents": len(lr), "seed": seed}
        snapshots = 2 * arm.size if arm.members == "snapshots" else 0
        settings |= {"lr": lr if len(set(lr)) > 1 else lr[0]}
        trained = train_agents(self.bench, settings, num_steps, snapshots)
        if trained.ms_per_step == trained.ms_per_step:
            self.ms_per_agent = max(self.ms_per_agent, trained.ms_per_step / len(lr))
            self.other_s = max(self.other_s, trained.seconds - trained.ms_per_step * num_steps / 1000)
        return trained

    def committee(self, arm: Arm, variant: Settings, trained: Trained, place: int) -> Committee:
        """The members of the ensemble that is the place'th in a run."""
        first = place * arm.agents
        match arm.members:
            case "agents":
                return trained.members[first : first + arm.agents]
            case "snapshots":  # of the second half of the run
                return [snapshot[first] for snapshot in trained.snapshots[-arm.size :]]
            case "masks":
                p = variant["dropconnect_p"]
                own_F = {first: trained.members[first]}
                masks = [draw_keep_masks(own_F, p, TUNING_SEED, step) for step in range(arm.size)]
                return [own_F[first] * keep[first] / (1 - p) for keep in masks]

    # ---- scoring

    def measured(self, arm: Arm) -> Row:
        """An arm with what tuning chose, for every seed."""
        began = time.perf_counter()
        if arm.size == 0:
            scores, drawn = scored(self.bench, [], self.options.rank)
            return {"seeds": [scores], "draws": _packed([drawn]), "about": self.about}
        chosen = self.tune(arm)
        variant, rank = chosen.variant, self.rank(arm, chosen.variant)
        seeds = self.options.seeds
        together = arm.has_own_batches and arm.agents * seeds <= self.options.most_agents
        runs = [(0, seeds)] if together else [(seed, 1) for seed in range(seeds)]
        found, times = [], []
        for seed, count in runs:
            trained = self.train(arm, variant, [chosen.rate] * count, chosen.epochs, seed)
            times.append(trained.ms_per_step)
            for place in range(count):
                members = self.committee(arm, variant, trained, place)
                found.append(scored(self.bench, members, rank))
        steps = self.bench.steps(chosen.epochs)
        if together and seeds > 1:  # the time of one seed alone
            few = min(steps, TIMED_STEPS)
            times = [self.train(arm, variant, [chosen.rate], chosen.epochs, 0, steps=few).ms_per_step]
        ms = sorted(times)[len(times) // 2]
        return {
            "rank": rank,
            "rate": chosen.rate,
            "rates": self.options.rates,
            "epochs": chosen.epochs,
            "variant": dict(variant),
            "settings": dict(arm.settings),
            "tuning_nll": chosen.nll,
            "steps": steps,
            "agents": arm.agents,
            "passes": arm.agents * steps * self.options.batch_size,
            "ms_per_step": ms,
            "train_s": ms * steps / 1000,
            "wall_s": time.perf_counter() - began,
            "seeds": [scores for scores, _ in found],
            "draws": _packed([drawn for _, drawn in found]),
            "about": self.about,
        }

    def keep(self, row: Row, measure: Callable[[], Row]) -> None:
        """Measure a row and write it, or why it failed."""
        began = time.perf_counter()
        try:
            figures = measure()
        except (InputError, RunError, ValidationError) as error:
            figures = {"failed": str(error)}
        self.results.add(row | figures)
        what = f"{row['task']}: {row['arm']}, {row['kind']} {row.get('epochs', '')} {row.get('variant', '')}"
        outcome = figures.get("failed", "done")
        print(f"{what}: {outcome}, {time.perf_counter() - began:.1f} s", flush=True)

    def is_asked(self, arm: Arm) -> bool:
        """Whether --arms has its name, or a part of it that is no arm's name."""
        names, parts = {one.name for one in self.wanted()}, self.options.arms
        return parts is None or any(
            part == arm.name or (part in arm.name and part not in names) for part in parts
        )

    def time_stock(self) -> None:
        model, rank = self.options.model, self.options.rank
        row = self.row("stock", STOCK, rank=rank)
        about = {"about": self.about}
        self.keep(row, lambda: {"ms_per_step": stock_ms_per_step(self.bench, model, rank), **about})

    def time_again(self) -> None:
        """Take the time of a step of stock PEFT and of every measured arm; the scores stay.

        Raises OutOfTime at the end of `--minutes`.
        """
        if self.is_asked(STOCK):
            self.time_stock()
        for arm in filter(self.is_asked, self.wanted()):
            known = self.results.of(self.row("arm", arm))
            if arm.size == 0 or known is None or "failed" in known:
                continue
            steps = min(known["steps"], TIMED_STEPS)
            ms = self.train(arm, known["variant"], [known["rate"]], known["epochs"], 0, steps).ms_per_step
            times = {"ms_per_step": ms, "train_s": ms * known["steps"] / 1000, "timed": self.about}
            self.results.add(known | times)
            print(f"{known['task']}: {arm.name}: {ms:.1f} ms a step", flush=True)

    def wanted(self) -> Iterator[Arm]:
        """The arms in their order; the combination once its sources are tuned."""
        options = self.options
        known = arms(options.agents, options.rank, options.sizes)
        yield from known
        found = {
            arm.name: (chosen.nll, chosen.variant)
            for arm in known
            if (chosen := self.chosen(arm.name)) is not None
        }
        sources = [arm for arm in known if arm.is_source]
        yield from combined_arms(options.agents, options.rank, options.sizes, found, sources)

    def run(self) -> None:
        """Raises OutOfTime at the end of `--minutes`."""
        if self.is_asked(STOCK) and not self.results.is_measured(self.row("stock", STOCK)):
            self.time_stock()
        for arm in self.wanted():
            row = self.row("arm", arm)
            if self.results.is_measured(row) or not self.is_asked(arm):
                continue
            self.keep(row, lambda arm=arm: self.measured(arm))


def _packed(drawn: Sequence[dict[str, list[float]]]) -> dict[str, str]:
    """The mean over seeds of each draw's score, as text: a file of one number a line would be long."""
    return {
        score: " ".join(
            f"{sum(own) / len(own):.5g}" for own in zip(*(one[score] for one in drawn), strict=True)
        )
        for score in drawn[0]
    }


def key_of(row: Row) -> Hashable:
    own = (row["kind"], row["base"], row["task"], row["arm"], row["size"])
    return own if row["kind"] != "tuning" else (*own, row["epochs"], str(sorted(row["variant"].items())))


def benches(options: argparse.Namespace, folder: Path) -> Iterator[Bench]:
    """The tasks, over one base on its device; their rows are written to the folder."""
    accelerator = make_accelerator(RunConfig(), RunConfig())
    tokenizer = load_tokenizer(options.model)
    counts = (options.train_rows, options.val_rows, options.test_rows, options.test_rows)
    sizes = Sizes(*counts, multiple=options.batch_size, longest=options.longest)
    settings = {
        "lora_rank": options.rank,
        "batch_size": options.batch_size,
        "max_new_tokens_eval": options.new_tokens,
    }
    base = None
    for argument in options.task or ["arithmetic_hard"]:
        rows: TaskRows = read_task(argument, folder, sizes, options.model, tokenizer)
        if base is None:
            config = RunConfig(**rows.settings)
            compiled = decide_execution(config, accelerator.device).compiled
            dtype = DTYPES[decide_precision(config.mixed_precision)]
            base = load_base(config, dtype, accelerator.device, compiled=compiled)
        torch._dynamo.reset()  # a limit counts the shapes of all tasks together
        # Each number of agents and rank is a shape of its own. Left open, several sizes at once would take
        # torch many minutes to simplify. Where answers are written, the number of targets must be open.
        torch._dynamo.config.automatic_dynamic_shapes = not rows.test.choices
        yield Bench(accelerator, base, rows, settings, folder)


def main() -> None:
    options = arguments((__doc__ or "").splitlines()[0])
    end = timing.deadline(60 * options.minutes)
    quiet_libraries()
    results = Results(options.out, "quality", key_of, page)
    if options.list:
        for row in results.rows:
            print(row["base"], row["task"], row["kind"], row["arm"], row.get("failed", "measured"), sep="\t")
        return
    try:
        with TemporaryDirectory() as folder:
            for bench in benches(options, Path(folder)):
                study = Study(bench, results, options, end)
                measure = study.time_again if options.time_again else study.run
                measure()
    except OutOfTime:
        print("the end of --minutes; the same command goes on", flush=True)
    draw_pictures(results.rows, options.out)
    print(results.write())


if __name__ == "__main__":
    with input_errors_end_the_program():
        main()
