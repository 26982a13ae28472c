"""Files: every format gives the same rows, and a damaged one is named with its line."""

import gzip
import json
import logging
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from files_made import GOOD, PROBLEMS, ROWS, write
from launching import PATIENCE_S
from rows import data_config, read_problems

from chorus.data import json_files, text_files
from chorus.data.files import rows_of_file
from chorus.errors import InputError


def as_lines(rows: list[dict]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def test_every_format_gives_the_same_problems(source: Path) -> None:
    assert read_problems(data_config(source)) == (PROBLEMS, [])


def test_a_byte_order_mark_blank_lines_and_carriage_returns_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": "a"}\r\n\r\n{"question": "r", "answer": "b"}')
    assert read_problems(data_config(path))[0] == [("Q: q\nA:", " a"), ("Q: r\nA:", " b")]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfquestion,answer\r\nq,a\r\n\r\nr,b\r\n")
    assert read_problems(data_config(path))[0] == [("Q: q\nA:", " a"), ("Q: r\nA:", " b")]


def test_braces_in_a_row_are_only_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "{answer} {0} {", "answer": "}"}])
    templates = {"prompt_template": "{{{question}}}", "completion_template": "{answer}{answer}"}
    assert read_problems(data_config(path, **templates))[0] == [("{{answer} {0} {}", "}}")]


TABLE_FAULTS = [
    ("rows.csv", "", "rows.csv:4: field 'answer' is empty"),  # a cell before it spans two lines
    ("rows.csv", "\t", "rows.csv:4: field 'answer' is empty"),
    ("rows.parquet", None, "rows.parquet row 2: field 'answer' is null"),
    ("rows.parquet", " ", "rows.parquet row 2: field 'answer' is empty"),
    ("rows.parquet", "\0", "rows.parquet row 2: field 'answer' holds the character U+0000"),
    ("folder", None, "folder (train) row 2: field 'answer' is null"),
]


@pytest.mark.parametrize(("name", "answer", "message"), TABLE_FAULTS)
def test_a_bad_row_of_a_table_is_named(tmp_path: Path, name: str, answer: str | None, message: str) -> None:
    path = write(
        tmp_path / name, [{"question": "two\nlines", "answer": "a"}, {"question": "q", "answer": answer}]
    )
    with pytest.raises(InputError) as error:
        read_problems(data_config(path))
    assert message in str(error.value)
    assert "skip_bad_rows: true" in str(error.value)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "folder"])
def test_a_table_without_a_needed_column_is_refused_even_where_bad_rows_are_skipped(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / name, [{"question": "q", "reply": "a"}])
    with pytest.raises(InputError, match="must have one column 'answer', has 'question', 'reply'"):
        read_problems(data_config(path, skip_bad_rows=True))


DAMAGED_FILES = [
    (
        "rows.jsonl",
        b'{"question": "q", "answer": "a"}\n{"question": "q"',
        ":2: is not valid JSON: Expecting ',' delim",
    ),
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n["q", "a"]\n', ":2: must be a JSON object, is list"),
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n\n"q"\n', ":3: must be a JSON object, is str"),
    (
        "rows.jsonl",
        b'\n{"question": "q", "question": "r"}',
        ":2: is not valid JSON: key 'question' appears twice",
    ),
    ("rows.jsonl", b'{"a": {"b": 1, "b": 1}}', ":1: is not valid JSON: key 'b' appears twice"),
    ("rows.jsonl", b"[" * 100_000, ":1: is not valid JSON: "),
    ("rows.jsonl", b"1" * 5_000, ":1: is not valid JSON: "),
    ("rows.jsonl", b'{"question": "q",\n "answer": "a"}', ":1: is not valid JSON: "),
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "\xff"}', ":2: is not UTF-8 at byte 15"),
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n\0\0\0\0', ":2: holds a NUL character"),
    ("rows.jsonl", b"", " (train) has no usable row: it is empty"),
    (
        "rows.json",
        b'[{"question": "q", "answer": "a"},\n\n {"question": }]',
        ":3: is not valid JSON: Expecting value",
    ),
    ("rows.json", b'[\n{"question": "q", "answer": "a"},\n"q"\n]', ":3: must be a JSON object, is str"),
    ("rows.json", b'[{"question": "q",\n"answer": "a"\n}\n\n,\n\n7]', ":7: must be a JSON object, is int"),
    (
        "rows.json",
        b'\n[{"question": "q", "answer": "a"},\n{"a": 1,\n"a": 2}]',
        ":3: is not valid JSON: key 'a' appears",
    ),
    ("rows.json", b'[{"question": "q", "answer": "a"},]', ":1: is not valid JSON: "),
    ("rows.json", b'{"data": []}', ": must be a list of objects"),
    (
        "rows.jsonl",
        b'[{"question": "q", "answer": "a"}]',
        ":1: holds a list of rows, and not one; name such a",
    ),
    (
        "rows.tsv",
        b"instruction\tother\nq, r\ta\n",
        "must have one column 'question', has 'instruction', 'other'",
    ),
    (
        "rows.json",
        b'{"question": "q",\n"answer": "a"}\n{"question": "q"}',
        ":3: is not valid JSON: Extra data",
    ),
    (
        "rows.json",
        b'{"question": "q", "answer": "a"}\n{"question": }',
        ":2: is not valid JSON: Expecting value",
    ),
    (
        "rows.json",
        b'{"data": [{"question": "q", "answer": "a"}]}',
        ": must be a list of objects, and has its rows in",
    ),
    (
        "rows.json",
        b'{\n"data": [{"question": "q"}]\n}',
        "take them out: jq -c '.data[]' rows.json > rows.jsonl",
    ),
    (
        "rows.jsonl.gz",
        b'{"question": "q", "answer": "a"}\n',
        ": is not a whole gzip file: Not a gzipped file",
    ),
    (
        "rows.jsonl.gz",
        gzip.compress(b'{"question": "q", "answer": "a"}\n' * 99, mtime=0)[:-9],
        ": is not a whole gzip file: ",
    ),
    (
        "rows.csv.gz",
        gzip.compress(b"question,answer\nq,a\nq\n", mtime=0),
        ":3: has 1 cells, the header has 2",
    ),
    ("rows.json", b"", ":1: is not valid JSON: "),
    ("rows.json", b" [ ] ", " (train) has no usable row: it is empty"),
    ("rows.csv", b"question,answer\nq,a\nq\n", ":3: has 1 cells, the header has 2"),
    ("rows.csv", b'question,answer\n"two\nlines",a\nq,a,b\n', ":4: has 3 cells, the header has 2"),
    (
        "rows.csv",
        b'question,answer\nq,a\nq,"never closed\n\n',
        ":3: is not valid CSV: unexpected end of data",
    ),
    ("rows.csv", b'question,answer\nq,"a"b\n', ":2: is not valid CSV: "),
    (
        "rows.csv",
        b"question,answer,answer\nq,a,b\n",
        ": must have one column 'answer', has 'question', 'answer', 'ans",
    ),
    ("rows.csv", b"question,answer\nq,\xe9\n", ":2: is not UTF-8 at byte 3"),
    ("rows.csv", b"question,answer\nq,a\0\n", ":2: holds a NUL character"),
    ("rows.csv", b"question,answer\n", " (train) has no usable row: it is empty"),
    ("rows.csv", b"", " (train) has no usable row: it is empty"),
    ("rows.parquet", b"no parquet", ": cannot be read as parquet after row 0: "),
    ("rows.parquet", b"", ": cannot be read as parquet after row 0: "),
]


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize(("name", "content", "message"), DAMAGED_FILES)
def test_a_damaged_file_is_named_with_its_line_and_never_skipped(
    tmp_path: Path, name: str, content: bytes, message: str, skip_bad_rows: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_problems(data_config(path, skip_bad_rows=skip_bad_rows))
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz"])
def test_a_cell_may_be_of_any_length(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / name,
        [{"question": "q" * 300_000, "answer": "a"}, {"question": "q", "answer": "a" * 140_000}],
    )
    train, _ = read_problems(data_config(path))
    assert [len(prompt) + len(completion) for prompt, completion in train] == [300_008, 140_008]


def test_json_lines_under_the_name_json_are_read_with_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS).rename(tmp_path / "rows.json")
    assert read_problems(data_config(path))[0] == PROBLEMS
    path.write_text("\n" + as_lines([GOOD, GOOD, {"question": "q"}]))
    with pytest.raises(InputError, match=r"rows\.json:4: field 'answer' is missing"):
        read_problems(data_config(path))
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    )
    assert len(read_problems(data_config(path))[0]) == 1


BROKEN_LISTS = [
    '[{"a": 1},\n {"a": }]',
    '[{"a": 1}\n {"a": 2}]',
    '[{"a": 1},\n]',
    '[{"a": 1}, {"a": "b\n"}]',
    '[{"a": 1}, {"a": "\\x"}]',
    '[{"a": 1},\n {"a": 1',
    '[{"a": 1},\n {"a": "never closed}]',
    '[{"a": 1}',
    '[',
    '[{"a": 1}]\n ]',
    '\n[{"a": 1}\n]  \n{}',
]  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
@pytest.mark.parametrize("text", BROKEN_LISTS)
def test_a_broken_json_list_is_told_as_the_parser_of_the_whole_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int
) -> None:
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(json.JSONDecodeError) as whole:
        json.loads(text)
    error = whole.value
    with pytest.raises(InputError) as found:
        list(rows_of_file(path))
    expected = f"{path}:{error.lineno}: is not valid JSON: {error.msg} at column {error.colno}"
    assert str(found.value).startswith(expected)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_json_list_is_read_alike_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(text_files, "CHUNK", chunk)
    monkeypatch.setattr(json_files, "CHUNK", chunk)
    rows = [{"question": "é🙂\u2028\\", "answer": {"a": [1, -2.5e3, True, None, "]},{"]}}] * 5
    for indent in (None, 1):
        path = tmp_path / f"rows{indent}.json"
        path.write_text("\ufeff\n" + json.dumps(rows, indent=indent, ensure_ascii=indent is None))
        found = list(rows_of_file(path))
        assert [row.fields for row in found] == rows
        lines = [int(row.place.rpartition(":")[2]) for row in found]
        text = path.read_text().split("\n")
        assert lines == [2] * 5 if indent is None else [text[line - 1] for line in lines] == [" {"] * 5


def test_a_json_list_takes_no_more_memory_than_a_chunk_and_an_entry(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "q" * 1_000, "answer": "a"}] * 20_000))
    tracemalloc.start()
    assert sum(1 for _ in rows_of_file(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20 < path.stat().st_size


def test_what_is_no_utf_8_is_named_with_its_line_in_a_list_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CHUNK", 4)
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"question": "q", "answer": "a"},\n{"question": "\xff"}]')
    with pytest.raises(InputError, match=r"rows.json:2: is not UTF-8 at byte 15 of the line; save"):
        list(rows_of_file(path))
    path.write_bytes(b'[{"question": "q"},\n{"question": "\0"}]')
    with pytest.raises(InputError, match=r"rows.json:2: holds a NUL character; the file is damaged"):
        list(rows_of_file(path))
    for name in ("rows.json", "rows.jsonl", "rows.csv"):
        (tmp_path / name).write_text("[]", encoding="utf-16")
        with pytest.raises(InputError, match=rf"{name}:1: is UTF-16 text; save the file as UTF-8"):
            list(rows_of_file(tmp_path / name))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_cells_may_be_separated_by_what_makes_the_columns(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "".join(f"{q}{delimiter}{a}\n" for q, a in (("question", "answer"), ("a, b", "1,5"), ("c", "2")))
    )
    assert read_problems(data_config(path))[0] == [("Q: a, b\nA:", " 1,5"), ("Q: c\nA:", " 2")]


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_problems(data_config(path))


def test_good_rows_bring_no_warning(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "chorus"):
        read_problems(data_config(source, skip_bad_rows=True))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_file_of_bad_rows_only_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "q"}] * 3)
    with pytest.raises(
        InputError, match=r"no usable row: all 3 are bad, the first at .*rows.jsonl:1 \(field 'answer'"
    ):
        read_problems(data_config(path, skip_bad_rows=True))


def test_text_files_are_checked_without_a_model_library(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ROWS)
    code = (
        "import sys; from chorus.config import Config; from chorus.data.sources import open_splits\n"
        "from chorus.data.templates import TextForm\n"
        f"config = Config(dataset_name={str(path)!r})\n"
        "for row in open_splits(config).train.rows(None, ()): TextForm.of(config).write(row.fields)\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
