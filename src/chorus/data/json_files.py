"""Rows of JSON files: one object per line, or a list, which is streamed. Each row has its line number."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from chorus.data.text_files import CHUNK, Row, text_chunks, text_lines
from chorus.errors import InputError

SPACE = re.compile(r"[ \t\r\n]*")  # JSON's
LONGEST_WORD = 12  # of JSON, which may lie across two chunks: `-Infinity`, `\ud83d\ude42`


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return row


@contextmanager
def _json_errors_named(path: Path, line: int, column: int = 1) -> Iterator[None]:
    """Name the location of errors in a text that begins at `line` and `column` of its file."""
    try:
        yield
    except InputError:  # of reading on
        raise
    except (ValueError, RecursionError) as error:
        why = str(error)
        if isinstance(error, json.JSONDecodeError):
            in_line = error.colno + (column - 1 if error.lineno == 1 else 0)
            line, why = line + error.lineno - 1, f"{error.msg} at column {in_line}"
        raise InputError(f"{path}:{line}: is not valid JSON: {why}; correct it") from None


def _object_row(path: Path, line: int, value: object) -> Row:
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        raise InputError(f"{path}:{line}: holds a list of rows, and not one; name such a file .json")
    if not isinstance(value, dict):
        raise InputError(f"{path}:{line}: must be a JSON object, is {type(value).__name__}; correct it")
    return Row(f"{path}:{line}", value)


def jsonl_rows(path: Path, columns: object, optional: object) -> Iterator[Row]:
    return _rows_of_lines(path, text_lines(path))


def _rows_of_lines(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            with _json_errors_named(path, number):
                value = json.loads(line.rstrip(), object_pairs_hook=_unique_keys)
            yield _object_row(path, number, value)


def json_rows(path: Path, columns: object, optional: object) -> Iterator[Row]:
    """A list of objects; or one object per line, which many tools write under this name."""
    if _first_character(path) == "[":
        yield from _listed_rows(path)
        return
    lines, head = text_lines(path), []
    for numbered in lines:
        head.append(numbered)
        if numbered[1].strip():
            break
    lines = chain(head, lines)
    if head and _is_a_row(head[-1][1]):
        yield from _rows_of_lines(path, lines)
        return
    with _json_errors_named(path, 1):
        whole = json.loads("".join(line for _, line in lines))
    raise InputError(f"{path}: {_not_a_list(path, whole)}")


def _first_character(path: Path) -> str:
    """The first character that is not white space; "" for an empty file."""
    chunks = (chunk.lstrip() for chunk in text_chunks(path))
    return next((chunk[0] for chunk in chunks if chunk), "")


def _is_a_row(line: str) -> bool:
    """Whether the line holds a row by itself: an object, but
    not one that holds the rows of the whole file."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and _key_of_rows(value) is None


def _key_of_rows(value: object) -> str | None:
    """The key under which an object holds rows, as in `{"data": [...]}`. Turns and tools are not rows."""
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


def _listed_rows(path: Path) -> Iterator[Row]:
    """The entries of a JSON list, streamed: only a chunk of the file and one entry are in memory."""
    decoder, text = json.JSONDecoder(object_pairs_hook=_unique_keys), _Passing(path)
    text.skip()
    text.take(1)  # the bracket
    while text.skip() != "]" or text.entries:
        with _json_errors_named(path, text.line, text.column):
            value = text.entry(decoder)
        yield _object_row(path, text.line_of_entry, value)
        if (found := text.skip()) == "]":
            break
        if found != ",":
            place = f"{path}:{text.line}: is not valid JSON: "
            raise InputError(f"{place}Expecting ',' delimiter at column {text.column}; correct it")
        text.take(1)
    text.take(1)
    if text.skip():
        place = f"{path}:{text.line}: is not valid JSON: "
        raise InputError(f"{place}Extra data at column {text.column}; correct it")


class _Passing:
    """A text that is streamed: `rest` begins at a line and column, counted from 1.

    Attributes:
        entries: how many values were taken.
        line_of_entry: where the last of them began.
    """

    def __init__(self, path: Path) -> None:
        self.chunks, self.rest, self.at = text_chunks(path), "", 0
        self.line, self.column, self.entries, self.line_of_entry = 1, 1, 0, 1

    def more(self, count: int = 1) -> bool:
        """Read on by `count` characters at least; False at the end of the file."""
        parts = [self.rest[self.at :]]
        for chunk in self.chunks:
            parts.append(chunk)
            count -= len(chunk)
            if count <= 0:
                break
        self.rest, self.at = "".join(parts), 0
        return len(parts) > 1

    def take(self, count: int) -> None:
        """Consume characters."""
        taken = self.rest[self.at : self.at + count]
        lines = taken.count("\n")
        self.line += lines
        self.column = count - taken.rindex("\n") if lines else self.column + count
        self.at += count

    def skip(self) -> str:
        """Skip white space; the next character, not consumed, or "" at the end of the file."""
        while True:
            space = SPACE.match(self.rest, self.at)
            self.take(space.end() - self.at if space else 0)
            if self.at < len(self.rest):
                return self.rest[self.at]
            if not self.more():
                return ""

    def entry(self, decoder: json.JSONDecoder) -> object:
        """Take one JSON value.

        Raises:
            JSONDecodeError: of a text that begins with the value.
        """
        self.line_of_entry, is_whole = self.line, False
        while True:
            try:
                value, end = decoder.raw_decode(self.rest, self.at)
            except json.JSONDecodeError as error:
                # A value cut off by the end of a chunk fails near that end, or as an unterminated string.
                is_cut = error.pos > len(self.rest) - LONGEST_WORD or error.msg.startswith("Unterminated")
                is_whole = not is_cut or not self.more(max(CHUNK, len(self.rest) - self.at))
                if is_whole:
                    raise json.JSONDecodeError(error.msg, self.rest[self.at :], error.pos - self.at) from None
                continue
            self.entries += 1
            self.take(end - self.at)
            return value
