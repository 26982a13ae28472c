"""Rows and templates: what is a usable row, what is said of one that is not, and what helps."""

import json
import logging
from pathlib import Path

import pytest
from files_made import GOOD, write
from rows import data_config, read_problems

from chorus.errors import InputError

BAD_ROWS = [
    ({"question": "q"}, "field 'answer' is missing (the row has 'question')"),
    ({"question": None, "answer": "a"}, "field 'question' is null"),
    ({"question": "q", "answer": 7.5}, "field 'answer' must be text or a whole number, is float (7.5)"),
    ({"question": "q", "answer": True}, "field 'answer' must be text or a whole number, is bool (True)"),
    ({"question": ["q"], "answer": "a"}, "field 'question' must be text or a whole number, is list"),
    ({"question": "q", "answer": ""}, "field 'answer' is empty"),
    ({"question": " \n\t", "answer": "a"}, "field 'question' is empty"),
    ({"question": "q\0", "answer": "a"}, "field 'question' holds the character U+0000, which is not text"),
    ({"question": "q", "answer": "\ud83d"}, "field 'answer' holds the character U+D83D, which is not text"),
]


def as_lines(rows: list[dict]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(("bad", "fault"), BAD_ROWS, ids=[fault for _, fault in BAD_ROWS])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_bad_json_row_is_named_by_file_and_line(tmp_path: Path, suffix: str, bad: dict, fault: str) -> None:
    path = tmp_path / f"rows{suffix}"
    lines = as_lines([GOOD, GOOD, bad, GOOD])
    path.write_text(lines if suffix == ".jsonl" else "[" + lines.replace("}\n{", "},\n{") + "]")
    with pytest.raises(InputError) as error:
        read_problems(data_config(path))
    is_number = "float" in fault or "bool" in fault
    remedy = "write such values as text" if is_number else "correct the row"
    assert str(error.value).startswith(f"{path}:3: {fault}; {remedy}")
    assert str(error.value).endswith(", or set skip_bad_rows: true to skip and count such rows")


def test_a_remedy_is_offered_only_where_it_helps(tmp_path: Path) -> None:
    """Skipping helps where other rows are good, and optional_columns where a column is empty."""
    bad = {"question": "q", "answer": [1]}
    with pytest.raises(
        InputError, match=r"rows.jsonl:1: field 'answer' must be text .*correct the row, or set skip"
    ):
        read_problems(data_config(write(tmp_path / "rows.jsonl", [bad, GOOD])))
    with pytest.raises(InputError) as error:
        read_problems(data_config(write(tmp_path / "rows.jsonl", [bad] * 3)))
    assert "skip_bad_rows" not in str(error.value)
    assert "correct prompt_template, completion_template or the data" in str(error.value)
    rows = write(tmp_path / "rows.jsonl", [{**GOOD, "more": "m"}, GOOD])
    with pytest.raises(InputError, match="name the column in optional_columns"):
        read_problems(data_config(rows, prompt_template="{question} {more}"))
    with pytest.raises(InputError) as error:  # a prompt of which nothing would be left
        read_problems(data_config(write(tmp_path / "rows.jsonl", [GOOD, {"question": "", "answer": "a"}])))
    assert "optional_columns" not in str(error.value)


ALPACA = [
    {"instruction": "Add one to 4.", "input": "", "output": "5"},
    {"instruction": "Add one to it.", "input": "7", "output": "8"},
    {"instruction": "Add one to 1.", "input": None, "output": "2"},
]
ALPACA_KEYS = {"prompt_template": "{instruction}\n{input}\nA:", "completion_template": " {output}"}


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "folder"]
)
def test_an_optional_column_may_be_empty_in_any_row_of_any_format(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / name, ALPACA)
    with caplog.at_level(logging.INFO, "chorus"):
        train, _ = read_problems(data_config(path, **ALPACA_KEYS))
    assert train == [
        ("Add one to 4.\n\nA:", " 5"),
        ("Add one to it.\n7\nA:", " 8"),
        ("Add one to 1.\n\nA:", " 2"),
    ]
    assert "3 rows of text, input is empty in 2 rows" in caplog.text
    with pytest.raises(InputError, match=r"field 'input' is (empty|null)"):
        read_problems(data_config(path, **ALPACA_KEYS, optional_columns=[]))


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_whatever_holds_nothing_is_an_empty_optional_column(tmp_path: Path, nothing: object) -> None:
    path = write(tmp_path / "rows.jsonl", [{**ALPACA[0], "input": nothing}, ALPACA[1]])
    train, _ = read_problems(data_config(path, **ALPACA_KEYS))
    assert train[0] == ("Add one to 4.\n\nA:", " 5")


def test_which_columns_may_be_empty_is_the_keys_word(tmp_path: Path) -> None:
    rows = [{"question": "q", "hint": "h", "answer": "a"}, {"question": "q", "answer": "a"}]
    path = write(tmp_path / "rows.jsonl", rows)
    keys = {"prompt_template": "{question}{hint}", "completion_template": "{answer}"}
    with pytest.raises(InputError, match=r"rows.jsonl:2: field 'hint' is missing"):
        read_problems(data_config(path, **keys))
    assert read_problems(data_config(path, **keys, optional_columns=["hint"]))[0] == [("qh", "a"), ("q", "a")]


def test_a_row_whose_every_column_is_empty_is_bad_and_a_column_that_no_row_has_is_misspelt(
    tmp_path: Path,
) -> None:
    rows = [{"input": "q", "output": "a"}, {"input": "", "output": "a"}]
    keys = {"prompt_template": "{input}:", "completion_template": "{output}"}
    with pytest.raises(InputError, match=r"rows.jsonl:2: field 'input' is empty"):
        read_problems(data_config(write(tmp_path / "rows.jsonl", rows), **keys))
    keys = {"prompt_template": "{instruction}{context}:", "completion_template": "{output}"}
    rows = [{"instruction": "q", "kontext": "c", "output": "a"}] * 2
    with pytest.raises(InputError, match="no row has the column 'context'; correct prompt_template"):
        read_problems(data_config(write(tmp_path / "rows.jsonl", rows), **keys))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "folder"])
def test_a_whole_number_is_text_in_every_format(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / name, [{"question": "q", "answer": number} for number in (1, -20, 12345678901234)]
    )
    assert [answer for _, answer in read_problems(data_config(path))[0]] == [" 1", " -20", " 12345678901234"]


def test_skipped_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(as_lines([GOOD, *(bad for bad, _ in BAD_ROWS), GOOD]))
    assert read_problems(data_config(path, skip_bad_rows=True))[0] == [("Q: q\nA:", " a")] * 2
    count = len(BAD_ROWS)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"skipped {count} of {count + 2} rows of {path} (train): "
        f"first at {path}:2 (field 'answer' is missing (the row has 'question'))"
    ]
