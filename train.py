"""Train K LoRA agents over one frozen base: `accelerate launch train.py [--config FILE] [key=value ...]`."""

import gc
import sys

from chorus.errors import end_on_signals, input_errors_end_the_program

if __name__ == "__main__":
    end_on_signals()  # before all that takes time

from chorus.config import Config, RunConfig, load_config
from chorus.progress import IMPORTING, announced, say

if __name__ == "__main__":
    # Before the heavy imports: a misspelt key is answered at once, not after ten seconds of loading
    # libraries.
    with input_errors_end_the_program():
        CONFIG = load_config(sys.argv[1:])
    say(f"{IMPORTING} ...")

gc.disable()  # the libraries make a million objects, and all of them stay: looking for garbage costs a second

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, cast

from chorus.checkpoint.export import refuse_non_finite, save_ensemble, write_ensemble
from chorus.checkpoint.initial_adapters import initial_folders, start_from
from chorus.checkpoint.output_dir import prepare_output_dir
from chorus.checkpoint.resume import (
    describe_run,
    find_start,
    load_best,
    refuse_another_base,
    restore_run,
    with_base,
)
from chorus.checkpoint.saving import PeriodicCheckpoints
from chorus.checkpoint.store import Checkpointer
from chorus.collectives import lost_processes_named, on_first_process
from chorus.config.idle import idle_keys
from chorus.config.keys import LoopSettings
from chorus.config.per_agent import NumberOrList
from chorus.data.batches import StepBatch, training_steps
from chorus.data.order import steps_per_epoch
from chorus.data.rows import Rows, read_rows
from chorus.data.sizes import no_larger_than_the_rows
from chorus.ensemble.evaluation_rows import read_evaluation_rows
from chorus.ensemble.mixture import Mixture
from chorus.ensemble.scoring import refuse_non_finite_answers
from chorus.ensemble.tables import evaluation_table
from chorus.mesh import make_mesh
from chorus.model.adapters import lora_shape
from chorus.model.agents import build_agents
from chorus.model.base import load_base
from chorus.model.execution import decide_execution, with_padding
from chorus.model.preflight import check_without_weights
from chorus.model.regularisation import Regularisation
from chorus.monitoring.evaluation import RunEvaluation, check_evaluation
from chorus.monitoring.metrics import LoggedMetrics
from chorus.monitoring.profiler import profiling
from chorus.monitoring.run_log import RunLog, open_run_log, quiet_libraries
from chorus.monitoring.trackers import decide_trackers
from chorus.planning.auto_agents import decide_num_agents
from chorus.planning.auto_packing import decide_packing
from chorus.planning.memory_check import foresee_memory, memory_errors_named
from chorus.reporting.run_report import check_report, write_run_report
from chorus.spans import each_in_span, span
from chorus.training.engine import (
    DTYPES,
    Engine,
    decide_precision,
    make_accelerator,
    start_engine,
    zero_stage,
)
from chorus.training.nonfinite import SkippedUpdates
from chorus.training.objective import Objective, objective_of
from chorus.training.schedule import diversity_weight, learning_rate
from chorus.training.signals import StopRequest
from chorus.training.step import AfterStep, MicroBatchLosses, StepDone

gc.freeze()  # nor is it looked for among them later, in the midst of a step
gc.enable()

logger = logging.getLogger("chorus.train")


def main(config: Config) -> None:
    quiet_libraries()
    # Everything the user gave is checked before the base is loaded.
    tokenizer, skeleton = check_without_weights(config, config.max_seq_length, lora_shape(config))
    report_to = decide_trackers(config.report_to)
    if config.report:
        check_report("key 'report'")
    precision = decide_precision(config.mixed_precision)
    accelerator = make_accelerator(config, config, config.num_agents)
    config = with_padding(config, accelerator.device, zero_stage(accelerator) == 3)
    rows = read_rows(config, config.seed, tokenizer, accelerator)
    config, packing_note = decide_packing(config, rows.train.lengths, skeleton.config, accelerator)
    config, agents_note = decide_num_agents(config, precision, accelerator, len(rows.train))
    mesh = make_mesh(accelerator, config.agent_parallel_size)
    check_evaluation(config)
    run = describe_run(config, rows.fingerprint, tokenizer, precision, accelerator)
    begin = find_start(config, run, accelerator)
    if begin.is_finished:
        accelerator.print(begin.finished_message(config.output_dir))
        accelerator.end_training()
        return
    initial = initial_folders(config) if begin.folder is None else []
    with ExitStack() as at_exit:
        output_dir = at_exit.enter_context(prepare_output_dir(config.output_dir, accelerator, begin))
        run_log = at_exit.enter_context(
            closing(open_run_log(accelerator, output_dir, config.model_dump(), report_to))
        )
        begin.log()
        for note in filter(None, (agents_note, packing_note, *idle_keys(config))):
            logger.info(note)
        rows.log()
        held_out = rows.held_out(tokenizer, config.eval_samples)
        evaluation_rows = read_evaluation_rows(held_out, config, tokenizer, accelerator)
        scored = [row.sample for row in held_out.rows]
        given, config = config, no_larger_than_the_rows(config, rows.train, mesh.data_size)
        logger.log(*foresee_memory(config, precision, accelerator, rows.train, scored))
        execution = decide_execution(config, accelerator.device, base_in_shards=zero_stage(accelerator) == 3)
        num_steps = steps_of_run(config, len(rows.train), mesh.data_size)
        steps = training_steps(
            rows.train,
            config,
            config,
            agents=mesh.held_agents(config.num_agents),
            points_per_row=config.swd_points_per_row,
            pad_id=cast(int, tokenizer.eos_token_id),
            process_index=mesh.data_index,
            num_processes=mesh.data_size,
            num_steps=num_steps,
            start_step=begin.step,
            wants_few_shapes=bool(execution.compiled) or execution.captured,
        )
        model = load_base(config, DTYPES[precision], accelerator.device, compiled=execution.compiled)
        run = with_base(run, model, num_steps)
        refuse_another_base(begin, run, config)
        rates = Regularisation(config.dropconnect_p, config.lora_dropout, config.seed)
        how = (lora_shape(config), rates, execution)
        with announced("building the agents"):
            agents = build_agents(config.parallel_mode, model, config.num_agents, *how, mesh=mesh)
            start_from(agents, initial)
        engine = at_exit.enter_context(closing(start_engine(accelerator, agents, config, mesh)))
        logger.info("%s; precision %s", engine.description, precision)
        about = (config.num_agents, config.parallel_mode, len(rows.train), num_steps)
        logger.info("%d agents, %s; %d rows, %d steps", *about)

        evaluation = RunEvaluation(engine, evaluation_rows, config, run_log)
        evaluation.start(begin.saved)
        restore_run(engine, begin, output_dir)
        evaluation.make_up(begin.saved)
        gc.freeze()  # the agents last, too
        if not evaluation.stopped_early:
            checkpointer = Checkpointer(output_dir, config, run)
            train(
                *(engine, steps, begin.step, num_steps, config, checkpointer, run_log, evaluation),
                skips_in_a_row=begin.skips_in_a_row,
            )
        finish(engine, rows, given, output_dir, evaluation, num_steps)


def steps_of_run(config: RunConfig, num_rows: int, data_size: int) -> int:
    """Optimiser steps of the whole run: `max_train_steps`, or those of all epochs."""
    if config.max_train_steps is not None:
        return config.max_train_steps
    rows_of_a_step = (config.batch_size, config.gradient_accumulation_steps, data_size)
    return config.epochs * steps_per_epoch(num_rows, *rows_of_a_step)


def train(
    engine: Engine,
    steps: Iterator[StepBatch],
    start_step: int,
    num_steps: int,
    settings: LoopSettings,
    checkpointer: Checkpointer,
    run_log: RunLog,
    evaluation: RunEvaluation | None = None,
    *,
    skips_in_a_row: int = 0,
) -> None:
    """Train from `start_step` to `num_steps`, with all that happens every so many steps: the list of hooks.

    Raises:
        Preempted: SIGTERM or SIGINT has come, and the current step is saved.
        RunError: too many steps in a row skipped an agent's update; their state is saved.
    """
    compares_predictions = settings.swd_space == "probabilities" and settings.lambda_sw > 0
    head = engine.head() if compares_predictions else None
    ratios = settings.lambda_sw_warmup_ratio, settings.lambda_sw_decay_ratio
    lambda_at = diversity_weight(settings.lambda_sw, num_steps, *ratios)
    loss_fn = objective_of(settings, settings, engine.mesh, head, lambda_at)
    scores = dict if evaluation is None else evaluation.entries
    lr_at = learning_rate(settings.lr_scheduler_type, settings.lr, num_steps, settings.num_warmup_steps_ratio)
    skips = SkippedUpdates(settings.max_skipped_steps, skips_in_a_row, settings.output_dir)
    metrics = LoggedMetrics(
        *(run_log, engine, skips),
        logging_steps=settings.logging_steps,
        lambda_at=lambda_at,
        with_memory=settings.log_memory_usage,
    )
    with (
        run_log.training(num_steps, start_step),
        StopRequest(engine.accelerator, settings.collective_timeout_s) as stop,
        profiling(
            settings, engine, run_log, Path(settings.output_dir), start_step, num_steps
        ) as profile_step,
    ):
        # Called after every step, in this order and on every process. A hook that may ask for a checkpoint,
        # or for the end of training, stands before the checkpoints. The profiler is last: it times the
        # others, too.
        hooks = [
            stop.after_step,
            skips.after_step,
            metrics.after_step,
            *([] if evaluation is None else [partial(evaluation.after_step, stop=stop)]),
            PeriodicCheckpoints(checkpointer, engine, skips, settings.save_steps, scores).after_step,
            profile_step,
        ]
        take_steps(engine, steps, start_step, num_steps, loss_fn, lr_at, hooks)


def take_steps(
    engine: Engine,
    steps: Iterator[StepBatch],
    start_step: int,
    num_steps: int,
    loss_fn: Callable[..., Objective],
    lr_at: Callable[[int], NumberOrList],
    hooks: Sequence[AfterStep],
) -> None:
    """The training loop: one for every mode and every engine.

    Raises:
        Exception: the error with which a hook ends training; the step is saved by then.
    """
    device = engine.accelerator.device
    for step, step_batch in enumerate(each_in_span("data_loading", steps), start_step):
        losses = []
        for micro_step, batch in enumerate(step_batch.micro_batches):
            with span("data_transfer"):
                batch = batch.to(device)
            slot = micro_step * engine.mesh.data_size + engine.mesh.data_index
            with engine.micro_batch(is_last=micro_step == len(step_batch.micro_batches) - 1):
                with span("forward_pass"):
                    output = engine.module(batch, step=step, slot=slot)
                part = loss_fn(*output, batch, num_targets=step_batch.num_targets, step=step)
                engine.backward(part.share)
            losses.append(MicroBatchLosses(part.nll_K, part.swd, part.shared_nll))
        result = engine.step(lr_at(step))
        done = StepDone(step + 1, num_steps, step_batch, losses, result)
        for after_step in hooks:
            after_step(done)
        if done.error is not None:
            engine.accelerator.wait_for_everyone()
            raise done.error
        if done.ends_training:
            return


def finish(
    engine: Engine, rows: Rows, config: RunConfig, output_dir: Path, evaluation: RunEvaluation, num_steps: int
) -> None:
    """Export the agents, then score them and write what the scores say. Every process takes part.

    Raises:
        RunError: an agent's weights, or its losses on training rows, are not finite; nothing is exported.
    """
    accelerator = engine.accelerator
    if config.load_best_model_at_end:
        load_best(engine, output_dir, evaluation.best)
    with engine.unsharded():
        refuse_non_finite_answers(engine.agents, rows.train[: config.batch_size])
    about_rows = {"row_form": rows.chosen.table.about["form"]}  # in which form agents are to be asked
    # Before the evaluation: nothing that follows can lose it.
    save(engine, config, output_dir, about_rows)
    after = evaluation.final(num_steps)
    mixture = after.mixture or Mixture.uniform(config.num_agents)
    scores = {"before": evaluation.initial.report(), "after": after.report()}
    more = {**mixture.to_json(), **about_rows, "evaluation": scores}
    on_first_process(accelerator, lambda: write_ensemble(output_dir, mixture.weights, config, more))
    evaluation.run_log.table(evaluation_table(after))
    logger.info("the agents are in %s", output_dir / "agents")
    if config.report:
        on_first_process(accelerator, lambda: write_run_report(output_dir))
    accelerator.wait_for_everyone()


def save(engine: Engine, config: RunConfig, output_dir: Path, more: Mapping[str, Any]) -> None:
    """Write the adapters and `ensemble.json`. Every process takes part; the first one writes."""
    tensors = engine.adapter_values()
    refuse_non_finite(tensors)
    weights = Mixture.uniform(config.num_agents).weights
    on_first_process(engine.accelerator, lambda: save_ensemble(output_dir, tensors, weights, config, more))


if __name__ == "__main__":
    with (
        input_errors_end_the_program(),
        lost_processes_named(CONFIG.collective_timeout_s),  # pyright: ignore[reportPossiblyUnboundVariable]
        memory_errors_named(CONFIG),  # pyright: ignore[reportPossiblyUnboundVariable]
    ):
        main(CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
