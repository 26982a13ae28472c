"""Rows of text from a file, a folder, the hub or the built-in arithmetic: each one checked, none repaired.

Nothing here needs a model, a tokenizer or torch, so a bad row stops the run in its first second. Text files are read
with the standard library because `datasets` fills missing keys, merges types and drops the line numbers.
"""

import csv
import json
import logging
import random
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from chorus.config import Config
from chorus.data import arithmetic
from chorus.errors import InputError
from chorus.progress import announced
from chorus.seeding import derive_seed

logger = logging.getLogger(__name__)

BUILT_IN = "arithmetic"
# Enough for the tiny base to learn the form of an answer in minutes on a CPU; 500 put 2 % of error on an exact match.
BUILT_IN_ROWS: dict[arithmetic.Split, int] = {"train": 4_000, "validation": 500}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, or half of a surrogate pair: no tokenizer can encode the latter


class Problem(NamedTuple):
    """One row: what the model is given, and what it shall answer."""

    prompt: str
    completion: str


class Problems(NamedTuple):
    """The rows to train on and the rows held out, each in the order of its source."""

    train: list[Problem]
    validation: list[Problem]


class Row(NamedTuple):
    """A row as its source holds it, and where: `data.jsonl:7`, or `data.parquet row 7`."""

    place: str
    fields: Mapping[str, object]


@announced("reading the rows")
def read_problems(config: Config) -> Problems:
    """Read and check every row of `dataset_name`, fill the templates, and hold out validation rows.

    A source's own `validation` split (else its `test` split) is the validation set; a source with neither gives up
    `validation_split` of its rows, chosen by `seed`. `debug_subset_size` keeps the first training rows that remain.

    Raises InputError for a source that cannot be used and, unless `skip_bad_rows` is set, for the first
    row that lacks text for a field of the templates.
    """
    templates = Problem(config.prompt_template, config.completion_template)
    fields = template_fields(*templates)
    splits = open_source(config.dataset_name, config.dataset_subset, fields)
    if "train" not in splits:
        raise InputError(
            f"key 'dataset_name': {config.dataset_name!r} has no split 'train' (it has {_listed(splits)}); "
            "choose another dataset or dataset_subset"
        )

    def problems_of(split: str) -> list[Problem]:
        source = f"{config.dataset_name} ({split})"
        return fill_templates(splits[split], source, fields, templates, config.skip_bad_rows)

    train = problems_of("train")
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    if held_out is not None:
        validation = problems_of(held_out)
    else:
        train, validation = hold_out(train, config.validation_split, config.seed)
    return Problems(train[: config.debug_subset_size], validation)


def template_fields(*templates: str) -> list[str]:
    """The field names of templates such as `Question: {question}`, each once; the configuration holds plain names only.

    >>> template_fields("{question} {{braces}}", "{answer} to {question}")
    ['question', 'answer']
    """
    parts = [part for template in templates for part in string.Formatter().parse(template)]
    return list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))


def fill_templates(
    rows: Iterable[Row], source: str, fields: Sequence[str], templates: Problem, skip_bad_rows: bool
) -> list[Problem]:
    """The problems of all rows. A row without text in one of `fields` raises InputError, or is skipped and counted."""
    problems, bad = [], []
    for place, row in rows:
        fault = _fault(row, fields)
        if fault is None:
            problems.append(Problem(*(template.format_map(row) for template in templates)))
        elif skip_bad_rows:
            bad.append(f"{place} ({fault})")
        else:
            raise InputError(
                f"{place}: {fault}; correct the row, or set skip_bad_rows: true to skip and count such rows"
            )
    if not problems:
        reason = f"all {len(bad)} are bad, the first at {bad[0]}" if bad else "it is empty"
        raise InputError(
            f"key 'dataset_name': {source} has no usable row: {reason}; correct it or choose another dataset"
        )
    if bad:
        logger.warning("skipped %d of %d rows of %s: first at %s", len(bad), len(bad) + len(problems), source, bad[0])
    return problems


def hold_out(problems: list[Problem], fraction: float, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Split into (train, validation): a seeded choice of `fraction` of the rows, but at least one row on either side.

    No validation rows for fraction 0, and none of a single row.
    """
    if fraction == 0 or len(problems) < 2:
        return problems, []
    count = min(max(1, round(fraction * len(problems))), len(problems) - 1)
    held_out = set(random.Random(derive_seed(seed, "validation")).sample(range(len(problems)), count))
    train = [problem for index, problem in enumerate(problems) if index not in held_out]
    return train, [problem for index, problem in enumerate(problems) if index in held_out]


def open_source(name: str, subset: str | None, fields: Sequence[str]) -> dict[str, Iterable[Row]]:
    """The rows of each split of the built-in, a file, a folder made by `save_to_disk`, or a dataset of the hub.

    Raises InputError for a source that does not exist. A name that looks like a path is never asked of the hub.
    """
    path = Path(name)
    from_hub = name != BUILT_IN and not path.exists()
    if from_hub and (not HUB_ID.fullmatch(name) or path.suffix.lower() in READERS or _is_in_a_folder(path)):
        raise InputError(f"key 'dataset_name': {name!r} does not exist; correct the path")
    if subset is not None and not from_hub:
        raise InputError(
            f"key 'dataset_subset': {subset!r} is for datasets of the hub, not for {name!r}; set it to null"
        )
    if name == BUILT_IN:
        return {split: _built_in_rows(split, count) for split, count in BUILT_IN_ROWS.items()}
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"key 'dataset_name': {name!r} must be a file ending in {_listed(READERS)}, or a folder")
        return {"train": READERS[path.suffix.lower()](path, fields)}
    datasets = _load_folder(path) if path.is_dir() else _load_from_hub(name, subset)
    return {split: _dataset_rows(f"{name} ({split})", dataset, fields) for split, dataset in datasets.items()}


def _built_in_rows(split: arithmetic.Split, count: int) -> Iterator[Row]:
    """Data, like a file: the seed of a run does not change them."""
    for number, problem in enumerate(arithmetic.problems(split, count, seed=0), start=1):
        yield Row(f"{BUILT_IN} ({split}) row {number}", problem)


def _fault(row: Mapping[str, object], fields: Sequence[str]) -> str | None:
    """What is wrong with the row, or None."""
    for field in fields:
        if field not in row:
            return f"field {field!r} is missing (the row has {_listed(row)})"
        value = row[field]
        if value is None:
            return f"field {field!r} is null"
        if not isinstance(value, str):
            return f"field {field!r} must be text, is {type(value).__name__}"
        if not value.strip():
            return f"field {field!r} is empty"
        if found := NOT_TEXT.search(value):
            return f"field {field!r} holds the character U+{ord(found.group()):04X}, which is no text"
    return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "nothing"


def _is_in_a_folder(path: Path) -> bool:
    return path.parent != Path(".") and path.parent.is_dir()


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line with its end) of a UTF-8 file. Only a line feed ends a line: JSON may hold U+2028 as it is."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8")
                if "\0" in line:
                    raise InputError(f"{path}:{number}: holds a NUL character; the file is damaged or is no text")
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        at = error.start + 1
        raise InputError(f"{path}:{number}: is not UTF-8 at byte {at} of the line; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"key 'dataset_name': cannot read {path}: {error.strerror}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return row


@contextmanager
def _json_errors_named(path: Path, line: int) -> Iterator[None]:
    """Turn the errors of parsing a text that begins at `line`; a syntax error counts its own lines from there."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        why = str(error)
        if isinstance(error, json.JSONDecodeError):
            line, why = line + error.lineno - 1, f"{error.msg} at column {error.colno}"
        raise InputError(f"{path}:{line}: is not valid JSON: {why}; correct it") from None


def _object_row(path: Path, line: int, value: object) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{path}:{line}: must be a JSON object, is {type(value).__name__}; correct it")
    return Row(f"{path}:{line}", value)


def _jsonl_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    for number, line in _text_lines(path):
        if line.strip():
            with _json_errors_named(path, number):
                value = json.loads(line.rstrip(), object_pairs_hook=_unique_keys)
            yield _object_row(path, number, value)


def _json_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    text = "".join(line for _, line in _text_lines(path))
    with _json_errors_named(path, 1):
        whole = json.loads(text)
    if not isinstance(whole, list):
        raise InputError(f"{path}: must be a list of objects; a file with one object a line ends in .jsonl")
    # The text is valid. It is walked once more, value by value, for what the parser does not tell: lines and repeats.
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    line, end = 1, text.index("[") + 1
    line += text.count("\n", 0, end)
    for _ in whole:
        start = end
        while text[start] in " \t\r\n,":
            start += 1
        line += text.count("\n", end, start)
        with _json_errors_named(path, line):
            value, end = decoder.raw_decode(text, start)
        yield _object_row(path, line, value)
        line += text.count("\n", start, end)


def _csv_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _text_lines(path)), strict=True)
    header: list[str] | None = None
    first_line = 1  # of the record being read: a quoted field may span lines
    try:
        for record in reader:
            if record and header is None:
                header = record
                _check_columns(str(path), header, fields)
            elif record and header is not None:
                if len(record) != len(header):
                    raise InputError(f"{path}:{first_line}: has {len(record)} cells, the header has {len(header)}")
                yield Row(f"{path}:{first_line}", dict(zip(header, record, strict=True)))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{first_line}: is not valid CSV: {error}; correct it") from None


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow  # comes with datasets
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            _check_columns(str(path), file.schema_arrow.names, fields)
            for batch in file.iter_batches(columns=list(fields)):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"{path}: cannot be read as parquet after row {number}: {why}; write it again") from None


READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _check_columns(source: str, columns: Sequence[str], fields: Sequence[str]) -> None:
    """Refuse a table that lacks a column: not one of its rows could be used."""
    for field in fields:
        if columns.count(field) != 1:
            raise InputError(
                f"{source}: must have one column {field!r}, has {_listed(columns)}; "
                "correct it, or prompt_template and completion_template"
            )


def _load_folder(path: Path) -> Mapping[Any, Any]:
    import datasets

    remedy = "name a folder written by save_to_disk, or a file"
    with _loading_errors_named(f"key 'dataset_name': cannot load the folder '{path}'", remedy):
        loaded = datasets.load_from_disk(str(path))
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _load_from_hub(name: str, subset: str | None) -> Mapping[Any, Any]:
    import datasets

    place = f"key 'dataset_name': cannot load {name!r} (dataset_subset: {subset!r}) from the hub"
    with _loading_errors_named(place, "correct the name or subset, or download it and name a local file"):
        return datasets.load_dataset(name, subset)


@contextmanager
def _loading_errors_named(place: str, remedy: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(f"{place}: {why}; {remedy}") from error


def _dataset_rows(source: str, dataset: Any, fields: Sequence[str]) -> Iterator[Row]:
    _check_columns(source, dataset.column_names, fields)
    for number, row in enumerate(dataset.select_columns(list(fields)), start=1):
        yield Row(f"{source} row {number}", row)
