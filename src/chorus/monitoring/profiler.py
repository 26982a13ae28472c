"""Where the time of a step goes: times the first steps of a run part by part, then traces two more.

The parts of a step are spans (spans.py). A nested part is subtracted from its parent, and time outside of all
parts is `other`, so that parts add up to the step. Some work cannot be separated and counts where it happens:
the reduction of gradients, which DDP and ZeRO-2 overlap with `backward_pass`, and ZeRO-2's gathering of the
updated weights in `optimizer_step`. On a GPU a part is the time between the events at its ends: host work
that overlaps with a busy device takes no time.
"""

import logging
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch._dynamo.utils import counters

from chorus.collectives import on_first_process
from chorus.config.instruments import InstrumentSettings
from chorus.data.batches import StepBatch
from chorus.model.agents import causal_lm
from chorus.monitoring.flops import Work, work_of
from chorus.monitoring.memory import memory_line, memory_usage
from chorus.monitoring.run_log import RunLog
from chorus.monitoring.trace import Trace, tracing, write_trace
from chorus.spans import Span, Stopwatch, listening, span
from chorus.training.engine import Engine
from chorus.training.step import AfterStep, StepDone

logger = logging.getLogger(__name__)

# Enough to see a step and the gap between two; a longer trace is slow to open.
TRACED_STEPS = 2


class ProfiledStep(NamedTuple):
    """One optimiser step of this process.

    timed: the step and its parts.
    tokens: agent-tokens, K x B x T over its micro-batches, padding included.
    flops: useful ones.
    is_warm: it was not the first step, and nothing was compiled or captured in it.
    """

    timed: Span
    tokens: int
    flops: float
    is_warm: bool


@contextmanager
def profiling(
    settings: InstrumentSettings,
    engine: Engine,
    run_log: RunLog,
    output_dir: Path,
    start_step: int,
    num_steps: int,
) -> Iterator[AfterStep]:
    """The context of profiled training; gives the hook that marks the end of a step.

    Enter it just before the first step, and call the hook after all others, so that their time counts. The
    first step warms up, `profile_steps` are timed and reported, then `profile_trace` traces two more. The
    report is a collective call, at the same step on every process.
    """
    if not settings.profile_steps and not settings.profile_trace:
        yield lambda step: None
        return
    wanted = 1 + settings.profile_steps + settings.profile_trace
    if num_steps - start_step < wanted:
        left = max(num_steps - start_step, 0)
        logger.warning(
            "profiling needs %d steps, one to warm up, and %d are left: it will be short", wanted, left
        )
    # Closed also when the run fails, so that the listener goes.
    with closing(_profile(settings, engine, run_log, output_dir, start_step, num_steps)) as profile:
        next(profile)
        yield profile.send


def _profile(
    settings: InstrumentSettings,
    engine: Engine,
    run_log: RunLog,
    output_dir: Path,
    start_step: int,
    num_steps: int,
) -> Generator[None, StepDone]:
    """Every `yield` is a step of the loop, and receives its `StepDone`."""
    accelerator, num_agents = engine.accelerator, len(engine.agents.agents)
    timed_until = min(start_step + 1 + settings.profile_steps, num_steps)
    traced_until = min(timed_until + settings.profile_trace * TRACED_STEPS, num_steps)
    watched: list[ProfiledStep] = []
    work = work_of(causal_lm(engine.agents.peft_model(engine.agents.agents[0])))
    stopwatch = Stopwatch(accelerator.device)
    with listening(stopwatch):
        for _ in range(start_step, timed_until):
            compiled = counters["stats"]["unique_graphs"]
            with stopwatch("step") as timed:
                done = yield
            is_warm = bool(watched) and compiled == counters["stats"]["unique_graphs"]
            watched.append(_profiled_step(timed, done.batch, num_agents, work, is_warm))
    if settings.profile_steps:
        _report(watched, timed_until, engine, run_log)
    if traced_until > timed_until:
        with tracing(accelerator.device) if accelerator.is_main_process else nullcontext() as trace:
            for step in range(timed_until, traced_until):
                with span(f"step {step + 1}"):
                    yield
        on_first_process(accelerator, lambda: write_trace(cast(Trace, trace), output_dir / "profile"))
    while True:
        yield


def _profiled_step(
    timed: Span, step_batch: StepBatch, num_agents: int, work: Work, is_warm: bool
) -> ProfiledStep:
    tokens, flops = 0, 0.0
    for batch in step_batch.micro_batches:
        tokens += num_agents // batch.num_sets * batch.input_BT.numel()
        flops += work.of_batch(batch, num_agents)
    is_captured = any(inner.name == "recording" for inner in timed.everything_inside())
    return ProfiledStep(timed, tokens, flops, is_warm and not is_captured)


def _report(watched: Sequence[ProfiledStep], step: int, engine: Engine, run_log: RunLog) -> None:
    """Write the report to the run's log. A collective call: every process takes part."""
    device = engine.accelerator.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    report = summarise(watched, engine)
    if report is None:
        logger.warning("nothing was profiled: all of %d steps warmed up; raise profile_steps", len(watched))
        return
    usage = memory_usage(device)
    run_log.profile(
        step, {**report, "memory_gb": usage}, [*summary(report, step), memory_line(step, device, usage)]
    )


def summarise(watched: Sequence[ProfiledStep], engine: Engine) -> dict[str, Any] | None:
    """Averages over the warm steps, for metrics.jsonl; None if a process has no warm step. A collective call.

    parts: by name, in order of appearance: seconds (a call), calls, share of the step, and over all processes
        slowest_process_seconds (a call).
    """
    warm = [step for step in watched if step.is_warm]
    names = dict.fromkeys(inner.name for step in watched for inner in step.timed.everything_inside())
    passes = Counter(name.partition(".")[0] for name in names if "." in name)
    alone = {
        name for name in names if passes[name.partition(".")[0]] == 1 and "." in name
    }  # equal to their parent
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
    names = _sum_up_the_loss(names, total, calls)
    seconds = max(total["step"], 1e-12)
    rates = [
        len(warm),
        sum(step.tokens for step in warm) / seconds,
        sum(step.flops for step in warm) / seconds,
    ]
    per_call = [total[name] / max(calls[name], 1) for name in names]
    own = torch.tensor([*rates, *per_call], dtype=torch.float64, device=engine.accelerator.device)
    all_PN = cast(torch.Tensor, engine.accelerator.gather(own[None])).cpu()  # of every process
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


def _sum_up_the_loss(names: list[str], total: dict[str, float], calls: dict[str, int]) -> list[str]:
    """Add `loss_calculation`, the sum of both losses, which become its details. Returns the new names."""
    losses = [name for name in ("task_loss", "swd_loss") if name in names]
    if not losses:
        return names
    total["loss_calculation"] = sum(total[name] for name in losses)
    calls["loss_calculation"] = calls[
        losses[-1]
    ]  # once a micro-batch; the task loss may be taken agent by agent
    for name in losses:
        total[f"loss_calculation.{name}"], calls[f"loss_calculation.{name}"] = total[name], calls[name]
    place = names.index(losses[0])
    new = ["loss_calculation", *(f"loss_calculation.{name}" for name in losses)]
    return [*names[:place], *new, *(name for name in names[place:] if name not in losses)]


def summary(report: Mapping[str, Any], step: int) -> list[str]:
    """The report in lines for people."""
    has_others = report["processes"] > 1

    def line(name: str, part: Mapping[str, Any]) -> str:
        slowest = f", {part['slowest_process_seconds']:.4f}s on the slowest process" if has_others else ""
        share = f", {part['share']:.1%} of the step" if name != "step" else ""
        return f"{name}: {part['seconds']:.4f}s (avg over {part['calls']} calls){share}{slowest}"

    return [
        f"--- Performance Summary at Step {step} ---",
        *(line(name, part) for name, part in report["parts"].items()),
        line("step", report["step"]),
        f"agent-tokens/s: {report['agent_tokens_per_second']:,.0f}",
        f"useful TFLOP/s{' of a process' if has_others else ''}: {report['useful_tflops_per_process']:.4g}",
        f"warm-up: {report['warm_up_seconds']:.4f}s in {report['warm_up_steps']} steps, not in the averages",
    ]
