"""Rows of one file: JSON lines, JSON, CSV, TSV or parquet, text files also gzipped. Each row comes with its
place.

Text files are read with the standard library: `datasets` fills missing keys, merges types and drops line
numbers. Nothing here needs torch, a model or a tokenizer.
"""

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from chorus.errors import InputError

DELIMITERS = ",;\t|"  # of CSV, by preference
READ_AT_A_TIME = 1_000  # rows of a parquet file; more of them take more memory and save no time


class Row(NamedTuple):
    """A row as its source holds it, and where: `data.jsonl:7`, or `data.parquet row 7`."""

    place: str
    fields: Mapping[str, Any]


def kind_of(path: Path) -> str | None:
    """`.jsonl` for `rows.jsonl` and `rows.jsonl.gz`; None for a file that cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in READERS and suffixes[-1] != ".parquet" else None
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else None


def readable_suffixes() -> str:
    """The endings of files that can be read, for a message."""
    return f"{listed(READERS)} (text files also with '.gz')"


def rows_of_file(
    path: Path, columns: Sequence[str] | None = None, optional: Sequence[str] = ()
) -> Iterator[Row]:
    """The rows of a file in order.

    Args:
        columns: what is needed of a row; of a table nothing else is read. None: everything.
        optional: those of them that a table may lack.

    Raises:
        InputError: the file is damaged or not of its kind, or a table lacks a column.
    """
    kind = kind_of(path)
    assert kind is not None, "the caller has looked"
    return READERS[kind](path, columns, optional)


def listed(names: Iterable[str]) -> str:
    """Names in quotes, for a message."""
    return ", ".join(repr(name) for name in names) or "nothing"


def check_columns(
    source: str, found: Sequence[str], columns: Sequence[str] | None, optional: Sequence[str]
) -> None:
    """Refuse a table that lacks a column or has it twice: none of its rows could be used."""
    for column in columns or ():
        if found.count(column) != 1 and not (column in optional and column not in found):
            raise InputError(
                f"{source}: must have one column {column!r}, has {listed(found)}; "
                "correct it, or prompt_template and completion_template"
            )


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line with its end) of a UTF-8 file. Only a line
    feed ends a line: JSON may hold U+2028 as it is."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8")
                if "\0" in line:
                    raise InputError(
                        f"{path}:{number}: holds a NUL character; the file is damaged or is not text"
                    )
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        at = error.start + 1
        raise InputError(
            f"{path}:{number}: is not UTF-8 at byte {at} of the line; save the file as UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: is not a whole gzip file: {error}; compress it again") from None
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
    """Turn the errors of parsing a text that begins at `line`; a
    syntax error counts its own lines from there."""
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


def _jsonl_rows(path: Path, columns: Sequence[str] | None, optional: Sequence[str]) -> Iterator[Row]:
    return _rows_of_lines(path, _text_lines(path))


def _rows_of_lines(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            with _json_errors_named(path, number):
                value = json.loads(line.rstrip(), object_pairs_hook=_unique_keys)
            yield _object_row(path, number, value)


def _json_rows(path: Path, columns: Sequence[str] | None, optional: Sequence[str]) -> Iterator[Row]:
    """A list of objects, which is read whole; or one object a line, as many tools write under this name."""
    lines, head = _text_lines(path), []
    for numbered in lines:
        head.append(numbered)
        if numbered[1].strip():
            break
    lines = chain(head, lines)
    if head and _is_a_row(head[-1][1]):
        yield from _rows_of_lines(path, lines)
        return
    text = "".join(line for _, line in lines)
    with _json_errors_named(path, 1):
        whole = json.loads(text)
    if not isinstance(whole, list):
        raise InputError(f"{path}: {_not_a_list(path, whole)}")
    yield from _listed_rows(path, text, len(whole))


def _is_a_row(line: str) -> bool:
    """Whether the line holds a row by itself: an object, but
    not one that holds the rows of the whole file."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and _key_of_rows(value) is None


def _key_of_rows(value: object) -> str | None:
    """The key under which an object holds rows, as `{"data": [...]}` does. Turns and tools are no rows."""
    if not isinstance(value, dict) or any(isinstance(one, str) for one in value.values()):
        return None
    lists = {key: one for key, one in value.items() if isinstance(one, list)}
    objects = [one for rows in lists.values() for one in rows]
    if not all(isinstance(one, dict) and not {"role", "from"} & one.keys() for one in objects):
        return None
    return next(iter(lists), None)


def _not_a_list(path: Path, value: object) -> str:
    key = _key_of_rows(value)
    if key is not None:
        take_out = f"jq -c '.{key}[]' {path.name} > {path.stem}.jsonl"
        return f"must be a list of objects, and has its rows in key {key!r}; take them out: {take_out}"
    return "must be a list of objects, or one object a line; write it as such"


def _listed_rows(path: Path, text: str, count: int) -> Iterator[Row]:
    """The text is a valid list. It is walked again, value by
    value, for what the parser omits: lines and repeats."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    line, end = 1, text.index("[") + 1
    line += text.count("\n", 0, end)
    for _ in range(count):
        start = end
        while text[start] in " \t\r\n,":
            start += 1
        line += text.count("\n", end, start)
        with _json_errors_named(path, line):
            value, end = decoder.raw_decode(text, start)
        yield _object_row(path, line, value)
        line += text.count("\n", start, end)


def _csv_rows(path: Path, columns: Sequence[str] | None, optional: Sequence[str]) -> Iterator[Row]:
    """Cells of any length, separated by what makes the needed columns out of the header: , ; tab or |."""
    csv.field_size_limit(
        sys.maxsize
    )  # the default refuses cells above 131,072 characters; it holds for the process
    lines = (line for _, line in _text_lines(path))
    blank, header_line = [], ""
    for header_line in lines:
        if header_line.strip():
            break
        blank.append(header_line)
    reader = csv.reader(
        chain(blank, [header_line], lines), strict=True, delimiter=_delimiter(header_line, columns)
    )
    header: list[str] | None = None
    first_line = 1  # of the record being read: a quoted field may span lines
    try:
        for record in reader:
            if record and header is None:
                header = record
                check_columns(str(path), header, columns, optional)
            elif record and header is not None:
                if len(record) != len(header):
                    raise InputError(
                        f"{path}:{first_line}: has {len(record)} cells, the header has {len(header)}; "
                        "correct it, or put cells with separators or line breaks in quotes"
                    )
                yield Row(f"{path}:{first_line}", dict(zip(header, record, strict=True)))
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{first_line}: is not valid CSV: {error}; correct it") from None


def _delimiter(header_line: str, columns: Sequence[str] | None) -> str:
    """What splits the header into the needed columns, or, with none known, into the most."""

    def cells(delimiter: str) -> list[str]:
        try:
            return next(csv.reader([header_line], delimiter=delimiter), [])
        except csv.Error:
            return []

    return max(
        DELIMITERS, key=lambda one: len(set(columns or ()) & set(cells(one))) if columns else len(cells(one))
    )


def _parquet_rows(path: Path, columns: Sequence[str] | None, optional: Sequence[str]) -> Iterator[Row]:
    import pyarrow  # comes with datasets
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            found = file.schema_arrow.names
            check_columns(str(path), found, columns, optional)
            taken = None if columns is None else [column for column in columns if column in found]
            for batch in file.iter_batches(READ_AT_A_TIME, columns=taken):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: cannot be read as parquet after row {number}: {why}; write it again"
        ) from None


READERS: dict[str, Callable[[Path, Sequence[str] | None, Sequence[str]], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
