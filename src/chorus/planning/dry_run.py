"""The dry run: tries a configuration with real steps in every mode, and keeps nothing.

Each check says what was found and, if it fails, what to do. Every process takes part; the first one prints.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from chorus.collectives import on_first_process
from chorus.config import Config, RunConfig
from chorus.config.idle import idle_keys
from chorus.data.rows import Rows, read_rows
from chorus.data.samples import Sample
from chorus.data.sizes import no_larger_than_the_rows
from chorus.errors import InputError
from chorus.mesh import make_mesh
from chorus.model.adapters import lora_shape
from chorus.model.base import load_base
from chorus.model.execution import decide_execution, with_padding
from chorus.model.preflight import check_without_weights
from chorus.model.toy_base import write_toy_like
from chorus.monitoring.memory import memory_limit
from chorus.monitoring.run_log import quiet_libraries
from chorus.planning.auto_agents import decide_num_agents, machine_of
from chorus.planning.auto_packing import decide_packing
from chorus.planning.checks import Report, Stopped, sample_view
from chorus.planning.forecast import Forecast, in_words
from chorus.planning.memory_forecast import forecast
from chorus.planning.mode_checks import check_modes
from chorus.planning.run_plan import Plan, plan, sample_tokens
from chorus.planning.shared_ground import check_processes, folder_beside_output
from chorus.planning.trial_run import STEPS, Loop, Setting
from chorus.planning.way_out import way_out
from chorus.training.engine import DTYPES, decide_precision, make_accelerator
from chorus.training.zero.deepspeed_json import deepspeed_json
from chorus.training.zero.launcher import deepspeed_wanted

SETTINGS = "settings agree"
TOY_TOKENS = 256  # of a row, on the toy base used when the real one does not fit


def dry_run(config: Config, loop: Loop, report: Report) -> int:
    """Try the configuration and print a report. Returns the exit code: 0 all passed, 2 bad input, 3 a check
    failed.

    Args:
        loop: `train` of train.py, which is what is tried.
        report: of this process; only the first process's prints.
    """
    quiet_libraries()
    accelerator = None
    try:
        with report.trying(SETTINGS):
            precision = decide_precision(config.mixed_precision)
            accelerator = make_accelerator(config, config, config.num_agents)
            config = with_padding(config, accelerator.device, machine_of(accelerator, config).base_in_shards)
            report.add(SETTINGS, True, _deepspeed_settings(config, precision, accelerator))
        _try_all(report, config, precision, accelerator, loop)
    except Stopped:
        pass
    if accelerator is not None and not report.is_alone:
        report.join(gather_object([report.failures()]))
        accelerator.wait_for_everyone()
        accelerator.end_training()
    report.conclude()
    return report.exit_code


def _deepspeed_settings(config: Config, precision: str, accelerator: Accelerator) -> str:
    """The engine in words. DeepSpeed's JSON is checked even if this launch does not use DeepSpeed."""
    path = config.deepspeed_config_file
    if deepspeed_wanted(config):
        path = path or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "its built-in settings")
        return f"DeepSpeed by {path}, precision {precision}"
    if path is None or not Path(path).exists():
        return f"no DeepSpeed, precision {precision}"
    num_processes = machine_of(accelerator, config).mesh.data_size
    try:
        deepspeed_json(config, config, precision, num_processes)
    except InputError:
        # It may be written for more processes than this launch has.
        rows = json.loads(Path(path).read_text(encoding="utf-8")).get("train_batch_size")
        own = config.batch_size * config.gradient_accumulation_steps
        if not isinstance(rows, int) or rows % own or rows == own * num_processes:
            raise
        num_processes = rows // own
        deepspeed_json(config, config, precision, num_processes)
    return (
        f"no DeepSpeed, precision {precision}; {path} would do, at {num_processes} x {config.batch_size} rows"
    )


def _try_all(report: Report, config: Config, precision: str, accelerator: Accelerator, loop: Loop) -> None:
    with folder_beside_output(report, config, accelerator) as folder:
        if accelerator.num_processes > 1:
            check_processes(report, config, accelerator, folder)
        with report.trying("data, tokenizer and target modules"):
            checked = (config, config.max_seq_length, lora_shape(config))
            tokenizer, skeleton = check_without_weights(*checked)
            rows = read_rows(config, config.seed, tokenizer, accelerator)
            config, note = decide_packing(config, rows.train.lengths, skeleton.config, accelerator)
        if note:
            report.add("packing auto", True, note.partition(": ")[2])
        with report.trying("num_agents auto"):
            config, note = decide_num_agents(config, precision, accelerator, len(rows.train))
        if note:
            report.add("num_agents auto", True, note)
        if idle := idle_keys(config):
            report.add("keys that do nothing", True, "\n".join(idle))
        config = no_larger_than_the_rows(config, rows.train, machine_of(accelerator, config).mesh.data_size)
        with report.trying("memory"):
            told = on_first_process(
                accelerator, partial(forecast, config, precision, machine_of(accelerator, config))
            )
        machine = machine_of(accelerator, config)
        planned = plan(config, rows.train, told.trainable, skeleton.num_parameters(), machine, precision)
        tokens = sample_tokens(rows.train, 0, tokenizer)
        report.facts |= {"plan": planned._asdict(), "forecast_gib": told.report(), "sample": tokens}
        report.show(planned.table(config), told.table(), sample_view(tokens))
        _check_rows(report, config, rows, tokenizer)
        _check_disk(report, planned, folder)
        fits = _check_memory(report, config, precision, accelerator, told)
        with report.trying("base"):
            if not fits:
                toy = folder / "toy"
                on_first_process(accelerator, lambda: write_toy_like(config.model_name, tokenizer, toy))
                config = config.model_copy(
                    update={
                        "model_name": str(toy),
                        "batch_size": min(2, config.batch_size),
                        "num_agents": min(4, config.num_agents),
                    }
                )
            in_shards = machine_of(accelerator, config).base_in_shards
            compiled = decide_execution(config, accelerator.device, in_shards).compiled
            load = partial(load_base, config, DTYPES[precision], accelerator.device, compiled=compiled)
            base = None if in_shards else load()
        samples = rows.longest(STEPS * planned.rows_of_a_step)  # they decide what fits
        if not fits:
            samples = [Sample(ids[-TOY_TOKENS:], is_target[-TOY_TOKENS:]) for ids, is_target in samples]
        mesh = make_mesh(accelerator, config.agent_parallel_size)
        pad_id = cast(int, tokenizer.eos_token_id)
        setting = Setting(config, accelerator, base, load, samples, pad_id, loop, folder, mesh)
        check_modes(report, setting, precision, is_real=fits)


def _check_rows(report: Report, config: RunConfig, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    limit, lengths, chosen = config.max_seq_length, rows.chosen.lengths, rows.chosen
    longest, cut = int(lengths.max()), (lengths > limit).nonzero()[0]
    found = f"the longest of {len(lengths):,} rows has {longest} tokens, max_seq_length is {limit}"
    if len(cut):
        first = int(cut[0])
        found = (
            f"{len(cut):,} of {len(lengths):,} rows are longer than max_seq_length {limit}: the end of the "
            f"completion is cut off; first {chosen.place(first)} with {lengths[first]} tokens"
        )
    report.add(
        "no completion is cut off",
        not len(cut),
        found,
        f"set max_seq_length={longest} (the longest row), or shorten or take out such rows",
    )
    merged = chosen.facts["merged"]
    found = f"in all of {len(lengths):,} rows"
    if merged.any():
        places = merged.nonzero()[0]
        first, name = int(places[0]), "the first row with tokens that should carry loss"
        found = (
            f"not for {int(merged.sum()):,} characters of {len(places):,} rows; first {chosen.place(first)}"
        )
        report.show(sample_view(sample_tokens(chosen, first, tokenizer), name))
    report.add(
        "all of a completion is learnt",
        not merged.any(),
        found,
        "a token begins in the prompt and reaches into the completion: begin the completion with a space "
        "or a new line, or end the prompt with one",
    )
    for name, column, remedy in (
        ("one beginning token a row", "strays", "take the others out of the templates or the data"),
        ("every character is known", "unknown", "take another base, or take such characters out"),
    ):
        counts = chosen.facts[column]
        found = f"in all of {len(lengths):,} rows"
        if counts.any():
            places = counts.nonzero()[0]
            first = chosen.place(int(places[0]))
            found = f"not for {int(counts.sum()):,} tokens of {len(places):,} rows; first {first}"
        report.add(name, not counts.any(), found, remedy)


def _check_disk(report: Report, planned: Plan, folder: Path) -> None:
    free, needed = shutil.disk_usage(folder).free, planned.checkpoint_bytes * planned.checkpoints
    report.add(
        "room on the disk",
        free >= needed,
        f"{needed / 1e6:,.1f} MB for checkpoints, {free / 1e9:,.1f} GB free",
        "make room, or lower save_total_limit",
    )


def _check_memory(
    report: Report, config: RunConfig, precision: str, accelerator: Accelerator, told: Forecast
) -> bool:
    """Whether the real base fits, and so is tried."""
    limit = min(gather_object([memory_limit(accelerator.device, config.memory_fraction)]))
    whole = min(gather_object([memory_limit(accelerator.device, 1.0)]))
    remedy = ""
    if told.peak > limit:
        remedy = on_first_process(
            accelerator, lambda: way_out(config, precision, machine_of(accelerator, config), limit, told=told)
        )
    report.add(
        "memory",
        told.peak <= limit,
        f"forecast {in_words(told.peak)} of {in_words(limit)} allowed (memory_fraction "
        f"{config.memory_fraction:g} of the smallest device)",
        remedy,
    )
    return told.peak <= whole
