"""What a run will do: its sizes, its steps, and one training row with its loss mask."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from chorus.config import RunConfig
from chorus.data.batches import Sample, steps_per_epoch, tokenise
from chorus.data.sources import Problem, Row, open_source, template_fields

UNCUT = 2**31  # longer than any row


class Rows(NamedTuple):
    """The training rows as the agents will see them.

    Attributes:
        samples: cut to max_seq_length, without those that then have no target token.
        lengths: tokens of every row before the cut.
    """

    samples: list[Sample]
    lengths: list[int]


class Plan(NamedTuple):
    """The sizes of a run. `describe` puts them into words."""

    agents: int
    rank: int
    trainable: int
    base_parameters: int
    num_processes: int
    rows: int
    longest_row: int
    rows_of_a_step: int
    steps_of_an_epoch: int
    steps: int
    checkpoint_bytes: int
    checkpoints: int

    def describe(self, config: RunConfig) -> list[tuple[str, str]]:
        epochs = self.steps / self.steps_of_an_epoch
        split = f"batch_size {config.batch_size} x accumulation {config.gradient_accumulation_steps}"
        megabytes = self.checkpoint_bytes / 1e6
        return [
            ("agents", f"{self.agents}, {config.parallel_mode}, rank {self.rank}"),
            ("base", f"{config.model_name}, {self.base_parameters:,} parameters, frozen"),
            ("trainable", f"{self.trainable:,} parameters, {self.trainable // self.agents:,} an agent"),
            ("rows", f"{self.rows:,} to train on, the longest of {self.longest_row} tokens"),
            ("a step", f"{self.rows_of_a_step} rows = {split} x processes {self.num_processes}; every agent sees all"),
            ("steps", f"{self.steps:,} ({self.steps_of_an_epoch:,} an epoch, {epochs:.2f} epochs)"),
            ("disk", f"{megabytes:,.1f} MB a checkpoint, at most {self.checkpoints} at a time"),
        ]

    def table(self, config: RunConfig) -> Table:
        table = Table(title="plan", title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for name, text in self.describe(config):
            table.add_row(name, text)
        return table


def read_rows(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> Rows:
    """Tokenise the training rows once, and cut them as `tokenise` does.

    Raises:
        InputError: no row keeps a target token.
    """
    whole = tokenise(problems, tokenizer, UNCUT)
    cut = (Sample(ids[:max_seq_length], is_target[:max_seq_length]) for ids, is_target in whole)
    samples = [sample for sample in cut if sample.num_targets > 0]
    if not samples:
        tokenise(problems, tokenizer, max_seq_length)  # raises the error of the run itself
    return Rows(samples, [len(sample.ids) for sample in whole])


def plan(config: RunConfig, rows: Rows, trainable: int, base_parameters: int, num_processes: int) -> Plan:
    """The sizes of a run over these rows."""
    rows_of_a_step = config.batch_size * config.gradient_accumulation_steps * num_processes
    of_an_epoch = steps_per_epoch(
        len(rows.samples), config.batch_size, config.gradient_accumulation_steps, num_processes
    )
    steps = config.epochs * of_an_epoch if config.max_train_steps is None else config.max_train_steps
    saves = -(-steps // config.save_steps) if config.save_steps else 1
    kept = saves if config.save_total_limit is None else min(saves, config.save_total_limit)
    return Plan(
        agents=config.num_agents,
        rank=config.lora_rank,
        trainable=trainable,
        base_parameters=base_parameters,
        num_processes=num_processes,
        rows=len(rows.samples),
        longest_row=max(len(sample.ids) for sample in rows.samples),
        rows_of_a_step=rows_of_a_step,
        steps_of_an_epoch=of_an_epoch,
        steps=steps,
        checkpoint_bytes=12 * trainable + 10**6,  # weights and two moments in fp32, and the JSON files
        checkpoints=kept + 1,  # the oldest is deleted once the newest is whole
    )


def place_of(config: RunConfig, problem: Problem) -> str:
    """Where a row comes from, such as `train.jsonl:7`."""
    templates = Problem(config.prompt_template, config.completion_template)
    fields = template_fields(*templates)
    for row in open_source(config.dataset_name, config.dataset_subset, fields)["train"]:
        if _fills(row, templates, problem):
            return row.place
    raise AssertionError("the source does not hold this row")


def _fills(row: Row, templates: Problem, problem: Problem) -> bool:
    try:
        return Problem(*(template.format_map(row.fields) for template in templates)) == problem
    except (KeyError, TypeError, ValueError):  # a bad row, skipped by skip_bad_rows
        return False


def sample_tokens(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Each token with its id and whether it has a loss. The first token has none: nothing precedes it."""
    texts = [tokenizer.decode([token]) for token in sample.ids.tolist()]
    targets = [False, *sample.is_target[1:].tolist()]
    rows = zip(sample.ids.tolist(), texts, targets, strict=True)
    return [{"id": token, "text": text, "loss": is_target} for token, text, is_target in rows]
