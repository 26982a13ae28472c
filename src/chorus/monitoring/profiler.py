"""Where the time of a step goes: the first steps of a run, timed part by part, and then a trace of two more.

The parts of a step are spans (spans.py) that do not overlap: what lies in one part and is a part itself is taken out of
it, and what is in none is `other`, so that they add up to the step. What no clock can separate stays where it happens:
the gradients' reduction, which DDP and ZeRO-2 overlap with `backward_pass`, and ZeRO-2's gathering of the stepped
weights in `optimizer_step`. On a GPU a part lasts from where the device reaches it to where the device leaves it: what
the host does while the device is busy costs nothing, and shows as nothing.
"""

import logging
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch._dynamo.utils import counters

from chorus.collectives import on_first_process
from chorus.config import RunConfig
from chorus.data.batches import StepBatch
from chorus.model.agents import causal_lm
from chorus.monitoring.flops import Work, work_of
from chorus.monitoring.memory import memory_line, memory_usage
from chorus.monitoring.run_log import RunLog
from chorus.monitoring.trace import Trace, tracing, write_trace
from chorus.spans import Span, Stopwatch, listening, span
from chorus.training.engine import Engine

logger = logging.getLogger(__name__)

TRACED_STEPS = 2  # enough to see what a step does and what is between two of them; a trace of many is slow to open


class ProfiledStep(NamedTuple):
    """One optimiser step of this process.

    timed: the step and the parts in it.
    tokens: agent-tokens, K x B x T over its micro-batches, padding included.
    flops: useful ones.
    is_warm: nothing was made for the first time in it.
    """

    timed: Span
    tokens: int
    flops: float
    is_warm: bool


def profiled(
    steps: Iterator[StepBatch], start_step: int, num_steps: int, engine: Engine, config: RunConfig, run_log: RunLog
) -> AbstractContextManager[Iterator[StepBatch]]:
    """A context that gives the steps, profiled in passing as `config` asks; the same iterator where it does not.

    The step after `start_step` warms up, `profile_steps` are timed and reported, then `profile_trace` traces two more.
    Reporting is a collective call, at the same step on every process.
    """
    if not config.profile_steps and not config.profile_trace:
        return nullcontext(steps)
    wanted = 1 + config.profile_steps + config.profile_trace
    if num_steps - start_step < wanted:
        left = max(num_steps - start_step, 0)
        logger.warning("profiling needs %d steps, one to warm up, and %d are left: it will be short", wanted, left)
    # Closed also when the run fails, so that nobody listens any more.
    return closing(_profiled(steps, start_step, num_steps, engine, config, run_log))


def _profiled(
    steps: Iterator[StepBatch], start_step: int, num_steps: int, engine: Engine, config: RunConfig, run_log: RunLog
) -> Generator[StepBatch]:
    accelerator = engine.accelerator
    timed_until = min(start_step + 1 + config.profile_steps, num_steps)
    traced_until = min(timed_until + config.profile_trace * TRACED_STEPS, num_steps)
    watched: list[ProfiledStep] = []
    work = work_of(causal_lm(engine.agents.peft_model(engine.agents.agents[0])))
    stopwatch = Stopwatch(accelerator.device)
    with listening(stopwatch):
        for _ in range(start_step, timed_until):
            compiled = counters["stats"]["unique_graphs"]
            with stopwatch("step") as timed:
                with span("data_loading"):
                    step_batch = next(steps)
                yield step_batch
            is_warm = bool(watched) and compiled == counters["stats"]["unique_graphs"]
            watched.append(_profiled_step(timed, step_batch, config.num_agents, work, is_warm))
    if config.profile_steps:
        _report(watched, timed_until, engine, run_log)
    if traced_until > timed_until:
        with tracing(accelerator.device) if accelerator.is_main_process else nullcontext() as trace:
            for step in range(timed_until, traced_until):
                with span(f"step {step + 1}"):
                    with span("data_loading"):
                        step_batch = next(steps)
                    yield step_batch
        folder = Path(config.output_dir, "profile")
        on_first_process(accelerator, lambda: write_trace(cast(Trace, trace), folder))
    yield from steps


def _profiled_step(timed: Span, step_batch: StepBatch, num_agents: int, work: Work, is_warm: bool) -> ProfiledStep:
    tokens, flops = 0, 0.0
    for batch in step_batch.micro_batches:
        rows, length = batch.input_BT.shape
        tokens += num_agents * rows * length
        flops += work.of_batch(batch, num_agents)
    is_captured = any(inner.name == "recording" for inner in timed.everything_inside())
    return ProfiledStep(timed, tokens, flops, is_warm and not is_captured)


def _report(watched: Sequence[ProfiledStep], step: int, engine: Engine, run_log: RunLog) -> None:
    """Tell the journal. A collective call, in which every process does the same."""
    device = engine.accelerator.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    report = summarise(watched, engine)
    if report is None:
        logger.warning("nothing was profiled: all of %d steps warmed up; raise profile_steps", len(watched))
        return
    usage = memory_usage(device)
    run_log.profile(step, {**report, "memory_gb": usage}, [*summary(report, step), memory_line(step, device, usage)])


def summarise(watched: Sequence[ProfiledStep], engine: Engine) -> dict[str, Any] | None:
    """Averages over the warm steps, as they go to metrics.jsonl; None where a process has none. A collective call.

    parts: by name, in order of appearance: seconds (a call), calls, share of the step, and over all processes
        slowest_process_seconds (a call).
    """
    warm = [step for step in watched if step.is_warm]
    names = dict.fromkeys(inner.name for step in watched for inner in step.timed.everything_inside())
    passes = Counter(name.partition(".")[0] for name in names if "." in name)
    alone = {name for name in names if passes[name.partition(".")[0]] == 1 and "." in name}  # all of its part: no news
    names = [*(name for name in names if name != "recording" and name not in alone), "other", "step"]
    total, calls = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    for step in warm:
        total["other"] += step.timed.own_seconds()
        total["step"] += step.timed.seconds()
        calls["other"] += 1
        calls["step"] += 1
        for inner in step.timed.everything_inside():
            if inner.name in total:
                total[inner.name] += inner.own_seconds()
                calls[inner.name] += 1
    seconds = max(total["step"], 1e-12)
    rates = [len(warm), sum(step.tokens for step in warm) / seconds, sum(step.flops for step in warm) / seconds]
    per_call = [total[name] / max(calls[name], 1) for name in names]
    own = torch.tensor([*rates, *per_call], dtype=torch.float64, device=engine.accelerator.device)
    all_PN = engine.gather(own[None]).cpu()  # of every process
    if not all_PN[:, 0].all():
        return None
    slowest = dict(zip(names, all_PN[:, 3:].amax(0).tolist(), strict=True))
    parts = {
        name: {
            "seconds": of_one_call,
            "calls": calls[name],
            "share": total[name] / seconds,
            "slowest_process_seconds": slowest[name],
        }
        for name, of_one_call in zip(names, per_call, strict=True)
        if calls[name]
    }
    return {
        "steps": len(warm),
        "warm_up_steps": len(watched) - len(warm),
        "warm_up_seconds": sum(step.timed.seconds() for step in watched if not step.is_warm),
        "step": parts.pop("step"),
        "parts": parts,
        "processes": len(all_PN),
        "agent_tokens_per_second": float(all_PN[:, 1].sum()),
        "useful_tflops_per_process": float(all_PN[:, 2].mean()) / 1e12,
    }


def summary(report: Mapping[str, Any], step: int) -> list[str]:
    """The report in lines for people."""
    is_one_of_many = report["processes"] > 1

    def line(name: str, part: Mapping[str, Any]) -> str:
        slowest = f", {part['slowest_process_seconds']:.4f}s on the slowest process" if is_one_of_many else ""
        share = f", {part['share']:.1%} of the step" if name != "step" else ""
        return f"{name}: {part['seconds']:.4f}s (avg over {part['calls']} calls){share}{slowest}"

    return [
        f"--- Performance Summary at Step {step} ---",
        *(line(name, part) for name, part in report["parts"].items()),
        line("step", report["step"]),
        f"agent-tokens/s: {report['agent_tokens_per_second']:,.0f}",
        f"useful TFLOP/s{' of a process' if is_one_of_many else ''}: {report['useful_tflops_per_process']:.4g}",
        f"warm-up: {report['warm_up_seconds']:.4f}s in {report['warm_up_steps']} steps, not in the averages",
    ]
