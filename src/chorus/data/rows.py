"""The rows of a run: which are trained on, which are held out, and the warnings about them.

Rows are tokenised once per host (`prepare_rows`, for one process of it) and then read by all (`Rows`). What a
process holds of a million rows is 8 bytes each, their order; the tokens stay in a mapped file.
"""

import hashlib
import logging
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from chorus.collectives import on_first_of_each_host
from chorus.config.data import DataSettings
from chorus.data.cache import TokenTable, cached_rows
from chorus.data.samples import Sample, Samples
from chorus.data.sources import open_split, open_splits
from chorus.data.templates import Problem
from chorus.data.tokenise import Encoder, check_tokenizer
from chorus.errors import InputError
from chorus.progress import announced
from chorus.seeding import derive_seed

logger = logging.getLogger(__name__)

# Other problems with tokens, by the column of FACTS that counts them.
STRAY = {
    "strays": ("beginning tokens are not at the beginning", "take them out of the templates or the data"),
    "unknown": ("tokens stand for characters that the tokenizer does not know", "no agent can learn those"),
}


class HeldOutRow(NamedTuple):
    """A row that agents are scored on.

    Attributes:
        prompt: the token ids that they are asked.
        answer: the token ids of the right answer as training has them, with the end token.
        sample: prompt and answer as in training, for the NLL.
    """

    prompt: list[int]
    answer: list[int]
    sample: Sample


class HeldOutRows(NamedTuple):
    """Rows that agents are scored on, and the tokens that end an answer, the end token first."""

    rows: list[HeldOutRow]
    end_ids: list[int]


class Prepared(NamedTuple):
    """Where the tokenised rows of a run lie on this host.

    Attributes:
        train: cache folder of the training split.
        validation: that of the held-out split; None where held-out rows are taken from the training split.
        fingerprint: SHA-256 over the text of every training row, in order.
        trains_on_held_out: both are the same rows of the same source.
    """

    train: Path
    validation: Path | None
    fingerprint: str
    trains_on_held_out: bool


@announced("reading the rows")
def prepare_rows(settings: DataSettings, seed: int, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Check and tokenise the rows, or find them in the cache. One process of each host calls it.

    Raises:
        InputError: a source that cannot be used, a bad row, or no usable row.
    """
    splits = open_splits(settings)
    train, validation = cached_rows(splits.train, settings, tokenizer), None
    is_trained_on = splits.validation is not None and splits.validation.identity == splits.train.identity
    if splits.validation is not None:
        validation = cached_rows(splits.validation, settings, tokenizer).folder
    rows, _ = chosen_rows(len(train), validation is not None, settings, seed)
    return Prepared(train.folder, validation, _fingerprint(train, rows), is_trained_on)


class Rows:
    """The rows of a run.

    Attributes:
        chosen: those to train on.
        train: the same without those that keep no target within max_seq_length.
        held_out_samples: all that are held out.
        fingerprint: SHA-256 over the text of every training row, in order.
        trains_on_held_out: both are the same rows of the same source.
    """

    def __init__(self, prepared: Prepared, settings: DataSettings, seed: int) -> None:
        """Raises InputError where most rows would lose what they should teach."""
        self.settings, self.fingerprint = settings, prepared.fingerprint
        table = TokenTable(prepared.train)
        has_own = prepared.validation is not None
        self.trains_on_held_out = prepared.trains_on_held_out
        chosen, held_out = chosen_rows(len(table), has_own, settings, seed)
        self.chosen = Samples(table, chosen)
        self.train = _with_targets(self.chosen)
        self.held_out_samples = Samples(table, held_out)
        if prepared.validation is not None:
            own = TokenTable(prepared.validation)
            self.held_out_samples = Samples(own, np.arange(len(own)))
        refuse_lost(self.chosen, "training", settings)

    def longest(self, count: int) -> list[Sample]:
        """The longest training rows, as many as there are up to `count`, the longest first."""
        order = np.argsort(-np.minimum(self.train.lengths, self.settings.max_seq_length), kind="stable")
        return [self.train[int(index)] for index in order[:count]]

    def log(self) -> None:
        """Log how rows are read; warn about skipped, cut and dropped rows, and about text without loss."""
        tables = dict.fromkeys([self.chosen.table, self.held_out_samples.table])
        for about in (table.about for table in tables):
            empty = [
                f"{column} is empty in {count} rows" for column, count in about["empty"].items() if count
            ]
            logger.info(
                "%s: %s", about["source"], ", ".join([f"{about['rows']:,} rows of {about['form']}", *empty])
            )
            if about["skipped"]:
                counts = about["skipped"], about["skipped"] + about["rows"]
                logger.warning(
                    "skipped %d of %d rows of %s: first at %s",
                    *counts,
                    about["source"],
                    about["first_skipped"],
                )
        if self.settings.chat_template is not None and self.chosen.table.about["form"] == "text":
            logger.warning(
                "key 'chat_template' does nothing, as the rows are text; set row_format=chat to render them "
                "as turns, or leave it out"
            )
        for key in ("prompt_template", "completion_template"):
            if "\\n" in getattr(self.settings, key):
                logger.warning(
                    "key '%s' holds a backslash and an n, and no line break; for a line break on the command "
                    "line put the text in quotes of its own: '%s=\"...\\n\"'",
                    *(key, key),
                )
        if self.trains_on_held_out:
            logger.warning(
                "held-out rows are the training rows: scores do not tell how new rows are answered; name "
                "others in validation_dataset_name or validation_dataset_split"
            )
        warn_of_losses(self.chosen, "training", self.settings.max_seq_length)

    def held_out(self, tokenizer: PreTrainedTokenizerBase, count: int) -> HeldOutRows:
        """The first `count` held-out rows, without those that keep no target within max_seq_length.

        Raises:
            InputError: most of them would lose the answer.
        """
        return _held_out_rows(self.held_out_samples[:count], tokenizer, self.settings)


def read_held_out(
    settings: DataSettings,
    name: str,
    key: str,
    count: int | None,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator | None = None,
    split: str | None = None,
) -> HeldOutRows:
    """The first `count` rows of a source other than the run's, read like the run's rows. A collective call,
    likewise.

    Args:
        name: in any form that dataset_name takes.
        key: what the user calls it, for errors.
        split: of the source; None is its only one, or `validation`.

    Raises:
        InputError: on every process alike: a source that cannot be used, a bad row, or no usable row.
    """
    check_tokenizer(tokenizer)

    def prepare() -> Path:
        return cached_rows(open_split(name, split, key), settings, tokenizer).folder

    folder = prepare() if accelerator is None else on_first_of_each_host(accelerator, prepare)
    table = TokenTable(folder)
    return _held_out_rows(Samples(table, np.arange(len(table)))[:count], tokenizer, settings)


def _held_out_rows(asked: Samples, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> HeldOutRows:
    if not len(asked):
        return HeldOutRows([], [int(tokenizer.eos_token_id)])  # pyright: ignore[reportArgumentType]
    refuse_lost(asked, "held-out", settings)
    warn_of_losses(asked, "held-out", settings.max_seq_length)
    kept, encoder = _with_targets(asked), Encoder(tokenizer)
    problems = [kept.table.problem(int(row)) for row in kept.rows]
    prompts, answers = map(encoder.prompt, problems), map(encoder.answer, problems)
    rows = [HeldOutRow(*parts) for parts in zip(prompts, answers, kept, strict=True)]
    fitting = [row for row in rows if len(row.prompt) < settings.max_seq_length]
    if len(fitting) < len(rows):  # with turns, the last answer may be cut off while an earlier one remains
        logger.warning(
            "left %d of %d held-out rows out: what stands before their last answer has more than "
            "max_seq_length %d tokens, and training never sees that answer",
            *(len(rows) - len(fitting), len(rows), settings.max_seq_length),
        )
    return HeldOutRows(fitting, kept.table.about["end_ids"])


def read_rows(
    settings: DataSettings,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator | None = None,
) -> Rows:
    """The rows of a run. A collective call of `accelerator`, if there is one: a process of each host prepares
    them.

    Raises:
        InputError: on every process alike; see `prepare_rows` and `Rows`.
    """
    check_tokenizer(tokenizer)

    def prepare() -> Prepared:
        return prepare_rows(settings, seed, tokenizer)

    prepared = prepare() if accelerator is None else on_first_of_each_host(accelerator, prepare)
    return Rows(prepared, settings, seed)


def chosen_rows(
    num_rows: int, has_held_out: bool, settings: DataSettings, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The places of the training rows and of the held-out rows among the usable rows of the training split.

    A data set that brings no held-out rows gives up `validation_split` of its own: a choice by the seed, of
    at least one row, with at least one left; none of a single row. `debug_subset_size` keeps the first
    training rows that remain.
    """
    is_train = np.ones(num_rows, dtype=bool)
    if not has_held_out and settings.validation_split > 0 and num_rows >= 2:
        count = min(max(1, round(settings.validation_split * num_rows)), num_rows - 1)
        is_train[random.Random(derive_seed(seed, "validation")).sample(range(num_rows), count)] = False
    return np.flatnonzero(is_train)[: settings.debug_subset_size], np.flatnonzero(~is_train)


def _with_targets(samples: Samples) -> Samples:
    return Samples(samples.table, samples.rows[samples.num_targets > 0])


def refuse_lost(samples: Samples, what: str, settings: DataSettings) -> None:
    """Raise InputError where most rows lose their answer: no token of it would be learnt, or none scored."""
    facts = samples.facts
    lost = np.flatnonzero(facts["is_lost"])
    if 2 * len(lost) <= len(facts):
        return
    of_merging = facts["merged"][lost] > 0
    first = f"first {samples.place(int(lost[0]))}"
    if 2 * of_merging.sum() > len(lost):
        raise InputError(
            f"key 'completion_template': in {len(lost)} of {len(facts)} {what} rows no token of the answer "
            f"carries loss, because a token that begins in the prompt reaches into it ({first}); begin the "
            "completion with a space or a new line, or end the prompt with one"
        )
    limit = settings.max_seq_length
    raise InputError(
        f"key 'max_seq_length': {limit} leaves no target token of the answer in {len(lost)} of {len(facts)} "
        f"{what} rows ({first}, of {int(facts['length'][lost[0]])} tokens); raise it, or shorten "
        "prompt_template"
    )


def warn_of_losses(samples: Samples, what: str, max_seq_length: int) -> None:
    """Warn about rows that are cut or dropped and text without loss, each with its count and first row."""
    facts = samples.facts
    cut = np.flatnonzero(facts["length"] > max_seq_length)
    if len(cut):
        logger.warning(
            "cut %d of %d %s rows to max_seq_length %d tokens; %d of them have no target token left and "
            "are dropped; first %s, of %d tokens",
            *(len(cut), len(facts), what, max_seq_length, int((facts["targets"] == 0).sum())),
            *(samples.place(int(cut[0])), int(facts["length"][cut[0]])),
        )
    for column, (fault, remedy) in STRAY.items():
        found = np.flatnonzero(facts[column])
        if len(found):
            logger.warning(
                "%d %s, in %d of %d %s rows, first %s; %s",
                *(int(facts[column].sum()), fault, len(found), len(facts), what),
                *(samples.place(int(found[0])), remedy),
            )
    merged = np.flatnonzero(facts["merged"])
    if len(merged):
        first = int(merged[0])
        logger.warning(
            "%d characters at the beginning of the completion carry no loss, in %d of %d %s rows: their "
            "token begins in the prompt; first %s, where %r ends the prompt and %r begins the completion",
            *(int(facts["merged"].sum()), len(merged), len(facts), what, samples.place(first)),
            *_boundary(samples, first),
        )


def _boundary(samples: Samples, index: int) -> tuple[str, str]:
    problem = samples.table.problem(int(samples.rows[index]))
    return problem.prompt[-10:], problem.completion[:10]


def data_fingerprint(rows: Iterable[Problem]) -> str:
    """SHA-256 over the text of every row, in order."""
    digest = hashlib.sha256()
    for prompt, completion, *_ in rows:
        digest.update(f"{len(prompt)} {len(completion)}\n{prompt}{completion}\n".encode())
    return digest.hexdigest()


def _fingerprint(table: TokenTable, rows: np.ndarray) -> str:
    """`data_fingerprint` of some rows of a table, cached beside it: reading a million rows takes seconds."""
    file = table.folder / f"fingerprint-{hashlib.sha256(rows.tobytes()).hexdigest()[:16]}.txt"
    if not file.is_file():
        is_chosen = np.zeros(len(table), dtype=bool)
        is_chosen[rows] = True
        text = data_fingerprint(
            problem for problem, chosen in zip(table.texts(), is_chosen, strict=True) if chosen
        )
        made = file.with_suffix(f".{os.getpid()}")
        made.write_text(text, encoding="utf-8")
        made.replace(file)
    return file.read_text(encoding="utf-8")
