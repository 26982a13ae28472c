"""The dry run's checks of every mode: its steps, its base, its checkpoint, and the other modes beside it."""

from chorus.collectives import on_first_process
from chorus.config import Config, RunConfig
from chorus.config.execution import MODES
from chorus.config.strict_yaml import as_yaml
from chorus.planning.auto_agents import machine_of
from chorus.planning.checks import Report, mode_table
from chorus.planning.forecast import GIB
from chorus.planning.memory_forecast import forecast
from chorus.planning.trial_run import ModeRun, Setting, disagreement, rehearse
from chorus.training.zero.launcher import deepspeed_wanted

# Relative differences due to rounding: order of sums, bf16, and AdamW's amplification of both.
TOLERANCE = {"no": 1e-3, "fp16": 2e-2, "bf16": 5e-2}


def check_modes(report: Report, setting: Setting, precision: str, is_real: bool) -> None:
    config, accelerator = setting.config, setting.accelerator
    machine = machine_of(accelerator, config)
    own = config.parallel_mode
    runs: list[ModeRun] = []
    forecasts: dict[str, int] = {}
    longest = len(setting.samples[0].ids) - 1
    pad = config.padding
    for mode in (own, *(mode for mode in MODES if mode != own)):
        report.show(f"trying {mode} ...")
        name = f"{mode}: optimiser steps"
        with report.trying(name, may_be_refused=mode != own):
            of_mode = config.model_copy(update={"parallel_mode": mode, "eval_samples": 0})
            peak = on_first_process(
                accelerator,
                lambda of_mode=of_mode: forecast(of_mode, precision, machine, -(-longest // pad) * pad).peak,
            )
            forecasts[mode] = peak
            runs.append(rehearse(setting, mode, is_own=mode == own))
            where = "on the real base" if is_real else "on a toy base: the real one does not fit"
            report.add(
                name, True, f"{len(runs[-1].losses)} steps {where}, loss {_mean(runs[-1].losses[-1]):.4f}"
            )
            _check_mode(report, runs[-1], config)
    _check_engine(report, config, runs[0])
    if accelerator.num_processes > 1:
        _check_holders(report, runs, config)
    worst = disagreement(runs)
    report.add(
        "modes agree",
        worst <= TOLERANCE[precision],
        f"losses differ by {worst:.1e} at most in {len(runs)} modes; {TOLERANCE[precision]:g} is rounding",
        f"train in {own} alone, and report it: the modes promise equal gradients",
    )
    _check_reload(report, runs[0], precision)
    report.facts["modes"] = [
        run.report() | {"forecast_gib": round(forecasts[run.mode] / GIB, 3)} for run in runs
    ]
    report.show(mode_table(runs, forecasts))


def _check_mode(report: Report, run: ModeRun, config: Config) -> None:
    stuck = [f"agent {agent} ({count} matrices)" for agent, count in run.unmoved.items() if count]
    report.add(
        f"{run.mode}: every agent learns",
        not stuck,
        f"all B of {len(run.unmoved)} agents moved" if not stuck else f"unmoved B: {', '.join(stuck)}",
        f"no gradient reaches them: look at lora_target_modules and lr ({as_yaml(config.lr)}), or report it",
    )
    report.add(
        f"{run.mode}: the base is unchanged",
        not run.changed,
        "every bit"
        if not run.changed
        else f"changed: {', '.join(run.changed[:3])} ({len(run.changed)} tensors)",
        "report it: the base must be frozen",
    )
    shared = not run.not_shared and run.growth == 0
    found = "one storage; one more agent takes only its adapters"
    if not shared:
        found = f"{len(run.not_shared)} tensors of their own ({', '.join(run.not_shared[:2])}); "
        found += f"one more agent takes {run.growth / 2**20:,.1f} MiB beside its adapters"
    report.add(
        f"{run.mode}: the base is shared",
        shared,
        found,
        "report it; until then set parallel_mode to another mode",
    )


def _check_engine(report: Report, config: Config, run: ModeRun) -> None:
    if deepspeed_wanted(config):
        active = run.engine.startswith("DeepSpeed")
        report.add(
            "DeepSpeed is active", active, run.engine, "launch with --config_file accelerate_config.yaml"
        )


def _check_holders(report: Report, runs: list[ModeRun], config: RunConfig) -> None:
    """Every agent lies on processes / A processes, and is the same on all of them after the steps."""
    size, wrong = config.agent_parallel_size, []
    for run in runs:
        copies = len(run.holders) // size
        for agent in range(config.num_agents):
            sums = [held[agent] for held in run.holders if agent in held]
            if len(sums) != copies or len(set(sums)) > 1:
                wrong.append(f"{run.mode}: agent {agent} on {len(sums)} processes, {len(set(sums))} unlike")
    copies = len(runs[0].holders) // size
    report.add(
        "each agent is equal on all its processes",
        not wrong,
        "; ".join(wrong[:3])
        or f"{config.num_agents // size} agents a process, each agent on {copies}, bitwise equal",
        "report it: the reduction of gradients leaves them apart",
    )


def _check_reload(report: Report, run: ModeRun, precision: str) -> None:
    assert run.reload is not None, "the mode of the run is the first"
    unchanged, differs, peft_differs, probability, weights = run.reload
    report.add(
        "learning changes the answers",
        not unchanged,
        "the loss of every agent changed"
        if not unchanged
        else f"bitwise unchanged: agents {', '.join(map(str, unchanged))}",
        "raise lr: the steps are lost in rounding",
    )
    report.add(
        "a checkpoint gives back the agents",
        differs == 0,
        f"hidden states differ by {differs:g}; 0 is bitwise equal",
        "report it, with the versions of torch and safetensors",
    )
    report.add(
        "stock PEFT reads the agents",
        peft_differs <= TOLERANCE[precision],
        f"logits differ by {peft_differs:.1e} of the largest, {TOLERANCE[precision]:g} is rounding",
        "report it, with the version of peft",
    )
    report.add(
        "the mixture is normalised",
        abs(probability - 1) < 1e-4 and abs(weights - 1) < 1e-5,
        f"probabilities sum to {probability:.6f}, weights to {weights:.6f}",
        "report it, with dirichlet_alpha_aggregator",
    )


def _mean(losses_K: list[float]) -> float:
    return sum(losses_K) / len(losses_K)
