"""Train K LoRA agents over one frozen base: `accelerate launch train.py [--config FILE] [key=value ...]`."""

import gc
import sys

from chorus.config import Config, RunConfig, load_config
from chorus.errors import input_errors_end_the_program

if __name__ == "__main__":
    # Before the heavy imports: a misspelt key is answered at once, not after ten seconds of loading libraries.
    with input_errors_end_the_program():
        CONFIG = load_config(sys.argv[1:])

gc.disable()  # the libraries make a million objects, and all of them stay: looking for garbage costs a second

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

from chorus.checkpoint.export import refuse_non_finite, save_ensemble, write_ensemble
from chorus.checkpoint.output_dir import prepare_output_dir
from chorus.checkpoint.resume import base_fingerprint, describe_run, find_start, refuse_another_base, restore_run
from chorus.checkpoint.store import Checkpointer
from chorus.collectives import lost_processes_named, on_first_process
from chorus.data.batches import StepBatch, steps_per_epoch, tokenise, training_steps
from chorus.data.sources import read_problems
from chorus.ensemble.evaluate import evaluate, evaluation_table, held_out_share
from chorus.errors import Preempted
from chorus.model.adapters import check_targets, lora_shape
from chorus.model.agents import Regularisation, build_agents
from chorus.model.base import load_base, load_skeleton, load_tokenizer
from chorus.model.execution import decide_execution
from chorus.monitoring.metrics import Meter
from chorus.monitoring.profiler import profiled
from chorus.monitoring.run_log import RunLog, open_run_log, quiet_libraries
from chorus.planning.auto_agents import decide_num_agents
from chorus.spans import span
from chorus.training.engine import DTYPES, Engine, decide_precision, make_accelerator, start_engine, zero_stage
from chorus.training.nonfinite import SkippedUpdates
from chorus.training.objective import objective_of
from chorus.training.schedule import learning_rate
from chorus.training.signals import StopRequest

gc.freeze()  # nor is it looked for among them later, in the midst of a step
gc.enable()

logger = logging.getLogger("chorus.train")


def main(config: Config) -> None:
    quiet_libraries()
    # Everything the user gave is checked before the base is loaded.
    problems = read_problems(config)
    tokenizer = load_tokenizer(config.model_name)
    check_targets(load_skeleton(config.model_name), config.lora_target_modules)
    precision = decide_precision(config.mixed_precision)
    accelerator = make_accelerator(config)
    config, agents_note = decide_num_agents(config, precision, accelerator)
    run = describe_run(config, problems.train, tokenizer, precision, accelerator)
    begin = find_start(config, run, accelerator)
    if begin.is_finished:
        accelerator.print(begin.finished_message(config.output_dir))
        accelerator.end_training()
        return
    output_dir = prepare_output_dir(config.output_dir, accelerator, begin.in_place)
    with ExitStack() as at_exit:
        run_log = at_exit.enter_context(closing(open_run_log(accelerator, output_dir, config.model_dump())))
        begin.log()
        if agents_note:
            logger.info(agents_note)
        samples = tokenise(problems.train, tokenizer, config.max_seq_length)
        held_out = held_out_share(
            problems.validation[: config.eval_samples],
            tokenizer,
            max_seq_length=config.max_seq_length,
            batch_size=config.eval_batch_size,
            max_new_tokens=config.max_new_tokens_eval,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        num_steps = config.max_train_steps
        if num_steps is None:
            rows_of_a_step = (config.batch_size, config.gradient_accumulation_steps, accelerator.num_processes)
            num_steps = config.epochs * steps_per_epoch(len(samples), *rows_of_a_step)
        steps = training_steps(
            samples,
            config,
            pad_id=cast(int, tokenizer.eos_token_id),
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_steps=num_steps,
            start_step=begin.step,
        )

        execution = decide_execution(config, accelerator.device, base_in_shards=zero_stage(accelerator) == 3)
        model = load_base(config, DTYPES[precision], accelerator.device, compiled=execution.compiled)
        run = {**run, "num_steps": num_steps, "fingerprints": {**run["fingerprints"], "base": base_fingerprint(model)}}
        run["skips_in_a_row"] = begin.facts.get("skips_in_a_row", 0)
        refuse_another_base(begin, run)
        agents = build_agents(
            config.parallel_mode,
            model,
            config.num_agents,
            lora_shape(config),
            Regularisation(config.dropconnect_p, config.lora_dropout, config.seed),
            execution,
        )
        engine = at_exit.enter_context(closing(start_engine(accelerator, agents, config)))
        logger.info("%s; precision %s", engine.description, precision)
        logger.info(
            "%d agents, %s; %d rows, %d steps", config.num_agents, config.parallel_mode, len(samples), num_steps
        )

        with engine.whole():
            before = evaluate(agents, held_out, config.dirichlet_alpha_aggregator)  # of the initial adapters, always
        restore_run(engine, begin, output_dir)
        gc.freeze()  # the agents last, too
        train(engine, steps, begin.step, num_steps, config, Checkpointer(output_dir, config, run), run_log)
        save(engine, config, output_dir)  # before the evaluation: nothing that follows can lose it
        with engine.whole():
            after = evaluate(agents, held_out, config.dirichlet_alpha_aggregator)
        scores = {"evaluation": {"before": before.report(), "after": after.report()}}
        on_first_process(accelerator, lambda: write_ensemble(output_dir, after.weights, config, scores))
        run_log.table(evaluation_table(before, after))
        logger.info("the agents are in %s", output_dir / "agents")
        accelerator.wait_for_everyone()


def train(
    engine: Engine,
    steps: Iterator[StepBatch],
    start_step: int,
    num_steps: int,
    config: RunConfig,
    checkpointer: Checkpointer,
    run_log: RunLog,
) -> None:
    """Take the optimiser steps from `start_step` to `num_steps` - 1: one loop for every mode and every engine.

    Raises:
        Preempted: SIGTERM or SIGINT has come, and the step that was under way is saved.
        RunError: too many steps in a row in which an agent had to be skipped; what they left is saved.
    """
    device = engine.accelerator.device
    accumulation = config.gradient_accumulation_steps
    lr_at = learning_rate(config.lr_scheduler_type, config.lr, num_steps, config.num_warmup_steps_ratio)
    loss_fn = objective_of(config, engine.gather)
    meter = Meter(config.num_agents, device, config.log_memory_usage)
    skips = SkippedUpdates(config.max_skipped_steps, checkpointer.facts)
    with (
        run_log.training(num_steps, start_step),
        StopRequest(engine.accelerator, config.collective_timeout_s) as stop,
        profiled(steps, start_step, num_steps, engine, config, run_log) as profiled_steps,
    ):
        for step, step_batch in enumerate(profiled_steps, start_step):
            engine.set_lr(lr_at(step))
            for micro_step, batch in enumerate(step_batch.micro_batches):
                with span("data_transfer"):
                    batch = batch.to(device)
                slot = micro_step * engine.num_processes + engine.process_index
                # ---- forward and backward; after the last micro-batch also clip, step and zero ----
                with engine.micro_batch():
                    with span("forward_pass"):
                        output = engine.module(batch, step=step, slot=slot)
                    part = loss_fn(*output, batch, num_targets=step_batch.num_targets, step=step)
                    engine.backward(part.share)
                # -----------------------------------------------------------------------------------
                meter.add(part, step_batch.num_targets, accumulation, batch.input_BT.numel())
            meter.end_step()
            done = step + 1
            is_logged = done in (1, num_steps) or done % config.logging_steps == 0
            is_stopped = stop.is_agreed()
            is_due = is_stopped or done == num_steps or bool(config.save_steps and done % config.save_steps == 0)
            is_spent = skips.look(done, engine, at_once=is_logged or is_due)
            metrics = meter.read(engine, config.lambda_sw, done, lr_at(step), skips.read()) if is_logged else None
            run_log.advance(metrics)
            if is_due or is_spent:
                with span("checkpoint"):
                    checkpointer.save(engine, done, step_batch.epoch)
            if is_stopped or is_spent:
                engine.accelerator.wait_for_everyone()
                if is_spent:
                    raise skips.error(done, output_dir=config.output_dir)
                raise Preempted(f"stopped and saved after step {done}; resume_from_checkpoint=auto goes on from there")


def save(engine: Engine, config: RunConfig, output_dir: Path) -> None:
    """Write the adapters and `ensemble.json`. Every process takes part; the first one writes."""
    tensors = engine.adapter_values()
    refuse_non_finite(tensors)
    weights = [1 / config.num_agents] * config.num_agents
    on_first_process(engine.accelerator, lambda: save_ensemble(output_dir, tensors, weights, config, {}))


if __name__ == "__main__":
    with input_errors_end_the_program(), lost_processes_named(CONFIG.collective_timeout_s):  # pyright: ignore
        main(CONFIG)  # pyright: ignore[reportPossiblyUnboundVariable]
