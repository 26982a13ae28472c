"""Rows of one file: JSON lines, JSON, CSV, TSV or parquet, text files also gzipped. Each row has its
location.

Nothing here needs torch, a model or a tokenizer.
"""

import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from chorus.data.json_files import json_rows, jsonl_rows
from chorus.data.text_files import Row, listed, text_lines
from chorus.errors import InputError

DELIMITERS = ",;\t|"  # separators of CSV, the preferred one first
READ_AT_A_TIME = 1_000  # rows of a parquet file; more of them take more memory and save no time


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
        columns: the needed columns; nothing else of a table is read. None: everything.
        optional: those of them that a table may lack.

    Raises:
        InputError: the file is damaged or not in its format, or a table lacks a column.
    """
    kind = kind_of(path)
    assert kind is not None, "the caller has looked"
    return READERS[kind](path, columns, optional)


def without_filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of an Arrow table without the nulls that Arrow adds for keys of other rows' objects. With them a
    tool call would have the arguments of all tools.
    """
    return {
        key: _as_written(value) if isinstance(value, list | dict) else value for key, value in row.items()
    }


def _as_written(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_written(one) for key, one in value.items() if one is not None}
    return [_as_written(one) for one in value] if isinstance(value, list) else value


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


def _csv_rows(path: Path, columns: Sequence[str] | None, optional: Sequence[str]) -> Iterator[Row]:
    """Cells of any length. The separator (, ; tab or |) is the one that yields the needed columns."""
    csv.field_size_limit(
        sys.maxsize
    )  # the default refuses cells above 131,072 characters; it holds for the process
    lines = (line for _, line in text_lines(path))
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
        raise InputError(
            f"{path}:{first_line}: is not valid CSV: {error}; correct it: a cell that begins with a quote "
            "ends with one, and quotes inside of it are doubled"
        ) from None


def _delimiter(header_line: str, columns: Sequence[str] | None) -> str:
    """The separator that yields the most needed columns of the header and, among ties, the most cells."""

    def found(delimiter: str) -> tuple[int, int]:
        try:
            cells = next(csv.reader([header_line], delimiter=delimiter), [])
        except csv.Error:
            cells = []
        return len(set(columns or ()) & set(cells)), len(cells)

    return max(DELIMITERS, key=found)


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
                    yield Row(f"{path} row {number}", without_filled(row))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(
            f"{path}: cannot be read as parquet after row {number}: {why}; write it again"
        ) from None


READERS: dict[str, Callable[[Path, Sequence[str] | None, Sequence[str]], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
