"""Training and scoring for quality.py: many runs in one process, over one base that is loaded once.

A run goes the product's own way: `build_agents`, `start_engine`, `training_steps` and the loop of train.py.
Its members then take their seats in agents made for evaluation, and `chorus.ensemble.evaluate` scores them.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from quality_tasks import TaskRows
from torch import Tensor
from transformers import PreTrainedModel

from chorus.checkpoint.store import Checkpointer
from chorus.config import RunConfig
from chorus.data.batches import training_steps
from chorus.data.order import steps_per_epoch
from chorus.data.rows import HeldOutRow
from chorus.ensemble.calibration import calibrate
from chorus.ensemble.distributions import Chunks, choice_chunks, predict, token_chunks
from chorus.ensemble.evaluate import CALIBRATED, Evaluation, evaluate
from chorus.ensemble.evaluation_rows import EvaluationRows
from chorus.ensemble.metrics import auroc, error_detection
from chorus.ensemble.next_token import Answerer
from chorus.model.agents import Agents
from chorus.model.execution import Execution, decide_execution
from chorus.monitoring.run_log import RunLog
from chorus.planning.trial_run import agents_of
from chorus.seeding import derive_seed
from chorus.training.engine import Engine, start_engine
from train import train

RESAMPLES = 300  # of the rows, for intervals
LOGGED = 10  # steps of a run that are logged; it is timed between them

# What a table shows of an answerer: the score, and whether it is taken at the fitted temperature. NLL and
# Brier are those of the task: of a question, or of a token.
SCORES = {
    "accuracy": ("cls/Acc", False),
    "nll_plain": ("NLL", False),
    "nll": ("NLL", True),
    "brier": ("Brier", True),
    "ece": ("cal/ECE", True),
    "auroc_errors": ("sc/AUROC/max_p", True),
    "aurc": ("sc/AURC/max_p", True),
    "auroc_ood": ("ood/AUROC/entropy", True),
    "auroc_ood_mi": ("ood/AUROC/mutual_information", True),
    "disagreement": ("ens/Disagreement", True),
}
Committee = list[Tensor]  # the flat adapters of an ensemble's members


@dataclass
class Bench:
    """What all runs on a task share. The base lies on the accelerator's device, frozen."""

    accelerator: Accelerator
    base: PreTrainedModel
    rows: TaskRows
    settings: dict[str, Any]  # of every run
    folder: Path
    _seats: dict[tuple[int, int], Agents] = field(default_factory=dict)

    def config(self, settings: Mapping[str, Any]) -> RunConfig:
        """The configuration of a run.

        LoRA's scaling is 2 at every rank. Nothing is clipped: a norm over all agents would couple them.
        """
        rank = settings.get("lora_rank", self.settings["lora_rank"])
        fixed = {"lora_alpha": 2.0 * rank, "max_grad_norm": 0.0, "max_train_steps": None}
        of_no_run = {"eval_samples": 0, "report": False, "log_memory_usage": False}
        place = {"output_dir": str(self.folder)}
        return RunConfig(
            **{**self.rows.settings, **self.settings, **fixed, **of_no_run, **place, **dict(settings)}
        )

    def steps(self, epochs: int) -> int:
        """Optimiser steps of so many epochs."""
        return epochs * steps_per_epoch(len(self.rows.train), self.settings["batch_size"], 1, 1)

    def seat(self, count: int, rank: int) -> Agents:
        """So many agents for evaluation. They are made once; fresh ones are the base."""
        if (count, rank) not in self._seats:
            config = self.config({"num_agents": count, "lora_rank": rank, "lambda_sw": 0.0})
            self._seats[count, rank] = agents_of(config, self.base, count, Execution()).eval()
        return self._seats[count, rank]

    def seated(self, members: Sequence[Tensor], rank: int) -> Agents:
        """Agents for evaluation with these adapters, until the next ones of their number take the seats."""
        agents = self.seat(len(members), rank)
        with torch.no_grad():
            for own_F, member_F in zip(agents.adapters().values(), members, strict=True):
                own_F.copy_(member_F)
        return agents


class Trained(NamedTuple):
    """What a run left.

    Attributes:
        members: each agent's adapter after the last step.
        snapshots: the same after every so many steps, the last step included.
        ms_per_step: without compilation and capture.
        seconds: of everything.
        loss: mean training loss of the agents at the last logged step, nats a token.
    """

    members: Committee
    snapshots: list[Committee]
    ms_per_step: float
    seconds: float
    loss: float


class _Snapshots(Checkpointer):
    """Keeps the adapters in place of writing checkpoints."""

    def __init__(self) -> None:
        self.kept: list[Committee] = []

    def save(
        self,
        engine: Engine,
        step: int,
        epoch: int,
        skips_in_a_row: int,
        scores: Mapping[str, Any] | None = None,
    ) -> None:
        self.kept.append([own_F.detach().clone() for own_F in engine.agents.adapters().values()])


class _Timer(RunLog):
    """Notes when the logged steps were done."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[int, float]] = []
        self.loss = float("nan")

    def advance(self, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None:
            self.marks.append((metrics["step"], time.perf_counter()))
            losses = metrics["task_loss_per_agent"]
            self.loss = sum(losses) / len(losses)

    def ms_per_step(self) -> float:
        between = [
            1000 * (ended - began) / (last - first) for (first, began), (last, ended) in pairwise(self.marks)
        ]
        return median(between) if between else float("nan")


def train_agents(bench: Bench, settings: Mapping[str, Any], num_steps: int, snapshots: int = 0) -> Trained:
    """Train by the loop of train.py.

    Args:
        snapshots: how many to take, evenly spaced over the run; at least one is.

    Raises:
        RunError: an agent's loss is not finite for many steps in a row.
        pydantic.ValidationError: settings that do not go together.
    """
    began = time.perf_counter()
    every = max(1, num_steps // LOGGED)
    saving = max(1, num_steps // snapshots) if snapshots else 0  # 0: after the last step alone
    config = bench.config({**settings, "logging_steps": every, "save_steps": saving})
    device = bench.accelerator.device
    execution = decide_execution(config, device)
    if not bench.rows.test.choices:
        torch._dynamo.reset()  # so that the number of targets alone is an open size
    agents = agents_of(config, bench.base, config.num_agents, execution)
    engine = start_engine(bench.accelerator, agents, config)
    steps = training_steps(
        bench.rows.train,
        config,
        config,
        agents=agents.agents,
        points_per_row=config.swd_points_per_row,
        pad_id=bench.rows.pad_id,
        process_index=0,
        num_processes=1,
        num_steps=num_steps,
    )
    kept, timer = _Snapshots(), _Timer()
    try:
        train(engine, steps, 0, num_steps, config, kept, timer)
    finally:
        engine.unwrap()
        del engine, agents, steps
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Trained(kept.kept[-1], kept.kept, timer.ms_per_step(), time.perf_counter() - began, timer.loss)


@torch.no_grad()
def calibrated_nll(bench: Bench, members: Committee, rank: int) -> tuple[float, float]:
    """The mixture's NLL of the tuning share, at the temperature that suits the calibration share, and the
    share of questions, or tokens, whose most probable outcome is the right one."""
    agents, rows = bench.seated(members, rank), bench.rows.tuning
    own = agents.agents
    answerer = Answerer("mixture", own, (1 / len(own),) * len(own))
    calibrated = calibrate(_chunks(agents, rows, rows.calibration), own, [answerer])
    scored = _chunks(agents, rows, rows.scored)
    temperatures = [calibrated.temperatures]
    (found,) = predict(scored(), calibrated.answerers, own, temperatures, len(rows.scored))[0]
    log_prob_N = torch.cat([one.log_prob_N for one in found]).double()
    is_top_N = torch.cat([one.is_top_N for one in found]).double()
    return -float(log_prob_N.mean()), float(is_top_N.mean())


def _chunks(agents: Agents, rows: EvaluationRows, asked: Sequence[HeldOutRow]) -> Chunks:
    if not rows.choices:
        return token_chunks(agents, agents.agents, [row.sample for row in asked])
    names = [rows.text(choice) for choice in rows.choices]
    targets = [names.index(rows.text(row.answer)) for row in asked]
    return choice_chunks(agents, agents.agents, [row.prompt for row in asked], rows.choices, targets)


def scored(bench: Bench, members: Committee, rank: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """The scores of an ensemble on the test rows, and those of `RESAMPLES` draws of the rows.

    Without members it is the base alone.
    """
    is_base = not members
    agents = bench.seat(1, rank) if is_base else bench.seated(members, rank)
    config = bench.config({"num_agents": len(agents.agents), "lambda_sw": 0.0})
    found = evaluate(agents, bench.rows.test, config, config.seed, with_base=is_base, with_agents=not is_base)
    name = "base" if is_base else found.chosen
    return _shown(found, name, bench.rows), _resampled(found, name, bench.rows)


def _shown(found: Evaluation, name: str, rows: TaskRows) -> dict[str, Any]:
    """`SCORES` of one answerer, its temperature, and the mean of its members' calibrated NLL."""
    at = {False: found.scores[name], True: found.scores[f"{name}/{CALIBRATED}"]}
    task = rows.score.split("/")[0]
    shown: dict[str, Any] = {}
    for score, (key, is_fitted) in SCORES.items():
        full = key if "/" in key else f"{task}/{key}"
        if full in at[is_fitted]:
            shown[score] = at[is_fitted][full]
    members = [
        own[rows.score] for one, own in found.scores.items() if one.startswith("agent_") and "/" in one
    ]
    if members:
        shown["nll_member"] = sum(members) / len(members)
    return {**shown, "temperature": found.temperatures[name]}


def _resampled(found: Evaluation, name: str, rows: TaskRows) -> dict[str, list[float]]:
    """The scores of rows drawn with replacement, and likewise those of another kind (Efron 1979).

    The draws depend on the numbers of rows alone. So a difference between two arms, draw by draw, is a paired
    bootstrap: what makes a row hard for all arms does not widen it.
    """
    answers = [one["answers"] for one in found.problems]
    plain, fitted = ([one[key] for one in answers] for key in (name, f"{name}/{CALIBRATED}"))
    N, M = found.num_problems, found.num_ood
    is_right_N = torch.tensor([one["right"] for one in plain[:N]])
    nll_N = torch.tensor([one["reference_nll"] for one in fitted[:N]], dtype=torch.float64)
    counts = [1 if rows.test.choices else row.sample.num_targets for row in rows.test.scored]
    count_N = torch.tensor(counts, dtype=torch.float64)
    uncertain_N, entropy_NM = (
        torch.tensor([one["uncertainty"][kind] for one in fitted], dtype=torch.float64)
        for kind in ("max_p", "entropy")
    )
    generator = torch.Generator().manual_seed(derive_seed(0, "quality resamples"))
    kept: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        drawn = torch.randint(N, (N,), generator=generator)
        errors = error_detection(uncertain_N[drawn], ~is_right_N[drawn])
        values = {
            "accuracy": float(is_right_N[drawn].double().mean()),
            "nll": float(nll_N[drawn].sum() / count_N[drawn].sum()),
            "auroc_errors": errors["AUROC"],
            "aurc": errors["AURC"],
        }
        if M:
            other = N + torch.randint(M, (M,), generator=generator)
            is_ood_NM = torch.arange(N + M) >= N
            values["auroc_ood"] = auroc(entropy_NM[torch.cat([drawn, other])], is_ood_NM)
        for score, value in values.items():
            kept.setdefault(score, []).append(value)
    return kept
