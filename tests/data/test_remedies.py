"""What an error says to do is done, and the error is gone: a bad input, its line, and the remedy."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rows import data_config, read_rows

from chorus.config import Config
from chorus.errors import InputError

ROWS = [{"question": f"what is {number}?", "answer": f"{number}"} for number in range(6)]
TURNS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
TEMPLATE = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def files(folder: Path, **contents: bytes) -> None:
    for name, content in contents.items():
        (folder / name.replace("_", ".")).write_bytes(content)


Make = Callable[[Path], Config]
GOOD: Make = lambda folder: data_config(folder / "rows.jsonl")  # noqa: E731


def keys(name: str = "rows.jsonl", **more: Any) -> Make:
    """A configuration of a file in the folder; {folder} in a text stands for the folder."""

    def made(folder: Path) -> Config:
        filled = {
            key: value.replace("FOLDER", str(folder)) if isinstance(value, str) else value
            for key, value in more.items()
        }
        return data_config(folder / name, **{"max_seq_length": 128, **filled})

    return made


PAIRS: dict[str, tuple[dict[str, bytes], Make, str, Make]] = {
    "path": ({}, keys("gone.jsonl"), "does not exist; correct the path", GOOD),
    "subset": ({}, keys(dataset_subset="main"), "set it to null", keys(dataset_subset=None)),
    "split": ({}, keys(dataset_split="tset"), "has 'train'.*name one of these", keys(dataset_split="train")),
    "glob": ({}, keys("*.foo"), "matches no file; give a glob of files ending in", keys("*.jsonl")),
    "two formats": (
        {"rows_csv": b"question,answer\n1,2\n"},
        keys("."),
        "name one kind by a glob, such as",
        keys("**/*.jsonl"),
    ),
    "UTF-16": (
        {"u_jsonl": lines(ROWS).decode().encode("utf-16")},
        keys("u.jsonl"),
        "save the file as UTF-8",
        GOOD,
    ),
    "a list on a line": (
        {"l_jsonl": json.dumps(ROWS).encode(), "l_json": json.dumps(ROWS).encode()},
        keys("l.jsonl"),
        "name such a file .json",
        keys("l.json"),
    ),
    "gzip": (
        {"g_jsonl_gz": b"x", "h_jsonl_gz": gzip.compress(lines(ROWS))},
        keys("g.jsonl.gz"),
        "compress it again",
        keys("h.jsonl.gz"),
    ),
    "a missing field": (
        {"m_jsonl": lines([*ROWS, {"question": "x"}])},
        keys("m.jsonl"),
        "set skip_bad_rows: true",
        keys("m.jsonl", skip_bad_rows=True),
    ),
    "an empty column of several": (
        {"e_jsonl": lines([{**row, "hint": "h" * (number % 2)} for number, row in enumerate(ROWS)])},
        keys("e.jsonl", prompt_template="{question} {hint}"),
        "name the column in optional_columns",
        keys("e.jsonl", prompt_template="{question} {hint}", optional_columns=["hint"]),
    ),
    "columns of other names": (
        {"o_jsonl": lines([{"q": "1", "a": "2"}] * 3)},
        keys("o.jsonl"),
        "has 'q', 'a'.*correct prompt_template, completion_template",
        keys("o.jsonl", prompt_template="{q}", completion_template=" {a}"),
    ),
    "columns of a table": (
        {"o_csv": b"q,a\n1,2\n"},
        keys("o.csv"),
        "correct it, or prompt_template and completion_template",
        keys("o.csv", prompt_template="{q}", completion_template=" {a}"),
    ),
    "cells": (
        {"c_csv": b"question,answer\n1,2,3\n", "d_csv": b'question,answer\n1,"2,3"\n'},
        keys("c.csv"),
        "put cells with separators or line breaks in quotes",
        keys("d.csv"),
    ),
    "a template of the base": (
        {"t_jsonl": lines(TURNS), "bad_jinja": b"{% for %}", "good_jinja": TEMPLATE.encode()},
        keys("t.jsonl", chat_template="FOLDER/bad.jinja"),
        r"key 'chat_template': it is not valid Jinja \(.*, line 1\); correct it",
        keys("t.jsonl", chat_template="FOLDER/good.jinja"),
    ),
    "a limit": ({}, keys(max_seq_length=4), "raise it, or shorten prompt_template", keys(max_seq_length=64)),
    "a cache": (
        {},
        keys(data_cache_dir="FOLDER/rows.jsonl/cache"),
        "make room, or name another folder",
        keys(data_cache_dir="FOLDER/cache"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("made", "bad", "line", "good"), PAIRS.values(), ids=PAIRS)
def test_the_remedy_that_a_line_names_helps(
    tmp_path: Path, made: dict[str, bytes], bad: Make, line: str, good: Make
):
    files(tmp_path, rows_jsonl=lines(ROWS), **made)
    with pytest.raises(InputError, match=line) as caught:
        read_rows(bad(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(read_rows(good(tmp_path)).train) > 0
