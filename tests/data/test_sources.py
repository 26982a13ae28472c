import csv
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from chorus.config import Config
from chorus.data import sources
from chorus.data.sources import Problem, read_problems
from chorus.errors import InputError

ROWS = [{"question": f"What is {n}\u2028plus, 1?\n“{n}”", "answer": str(n + 1), "other": "x"} for n in range(20)]
PROBLEMS = [Problem(f"Q: {row['question']}\nA:", f" {row['answer']}") for row in ROWS]
GOOD = {"question": "q", "answer": "a"}


def config(source: object, **keys: object) -> Config:
    defaults = {"prompt_template": "Q: {question}\nA:", "completion_template": " {answer}", "validation_split": 0.0}
    return Config.model_validate({"dataset_name": str(source), **defaults, **keys})


def write(path: Path, rows: list[dict]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case "":
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.fixture(params=["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / request.param, ROWS)


def test_every_format_gives_the_same_problems(source: Path) -> None:
    assert read_problems(config(source)) == (PROBLEMS, [])


def test_a_byte_order_mark_blank_lines_and_carriage_returns_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": "a"}\r\n\r\n{"question": "r", "answer": "b"}')
    assert read_problems(config(path)).train == [("Q: q\nA:", " a"), ("Q: r\nA:", " b")]
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfquestion,answer\r\nq,a\r\n\r\nr,b\r\n")
    assert read_problems(config(path)).train == [("Q: q\nA:", " a"), ("Q: r\nA:", " b")]


def test_braces_in_a_row_are_only_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "{answer} {0} {", "answer": "}"}])
    templates = {"prompt_template": "{{{question}}}", "completion_template": "{answer}{answer}"}
    assert read_problems(config(path, **templates)).train == [("{{answer} {0} {}", "}}")]


BAD_ROWS = [
    ({"question": "q"}, "field 'answer' is missing (the row has 'question')"),
    ({"question": None, "answer": "a"}, "field 'question' is null"),
    ({"question": "q", "answer": 7}, "field 'answer' must be text, is int"),
    ({"question": "q", "answer": True}, "field 'answer' must be text, is bool"),
    ({"question": ["q"], "answer": "a"}, "field 'question' must be text, is list"),
    ({"question": "q", "answer": ""}, "field 'answer' is empty"),
    ({"question": " \n\t", "answer": "a"}, "field 'question' is empty"),
    ({"question": "q\0", "answer": "a"}, "field 'question' holds the character U+0000, which is no text"),
    ({"question": "q", "answer": "\ud83d"}, "field 'answer' holds the character U+D83D, which is no text"),
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
        read_problems(config(path))
    assert str(error.value) == (
        f"{path}:3: {fault}; correct the row, or set skip_bad_rows: true to skip and count such rows"
    )


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
    path = write(tmp_path / name, [{"question": "two\nlines", "answer": "a"}, {"question": "q", "answer": answer}])
    with pytest.raises(InputError) as error:
        read_problems(config(path))
    assert message in str(error.value)
    assert "skip_bad_rows: true" in str(error.value)


@pytest.mark.parametrize("name", ["rows.parquet", "folder"])
def test_numbers_in_a_table_are_no_text(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"question": "q", "answer": 1}])
    with pytest.raises(InputError, match="row 1: field 'answer' must be text, is int"):
        read_problems(config(path))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "folder"])
def test_a_table_without_a_needed_column_is_refused_even_where_bad_rows_are_skipped(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"question": "q", "reply": "a"}])
    with pytest.raises(InputError, match="must have one column 'answer', has 'question', 'reply'"):
        read_problems(config(path, skip_bad_rows=True))


DAMAGED_FILES = [
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "q"', ":2: is not valid JSON: Expecting ',' delim"),
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n["q", "a"]\n', ":2: must be a JSON object, is list"),
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n\n"q"\n', ":3: must be a JSON object, is str"),
    ("rows.jsonl", b'\n{"question": "q", "question": "r"}', ":2: is not valid JSON: key 'question' appears twice"),
    ("rows.jsonl", b'{"a": {"b": 1, "b": 1}}', ":1: is not valid JSON: key 'b' appears twice"),
    ("rows.jsonl", b"[" * 100_000, ":1: is not valid JSON: "),
    ("rows.jsonl", b"1" * 5_000, ":1: is not valid JSON: "),
    ("rows.jsonl", b'{"question": "q",\n "answer": "a"}', ":1: is not valid JSON: "),
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "\xff"}', ":2: is not UTF-8 at byte 15"),
    ("rows.jsonl", b'{"question": "q", "answer": "a"}\n\0\0\0\0', ":2: holds a NUL character"),
    ("rows.jsonl", b"", " (train) has no usable row: it is empty"),
    ("rows.json", b'[{"question": "q", "answer": "a"},\n\n {"question": }]', ":3: is not valid JSON: Expecting value"),
    ("rows.json", b'[\n{"question": "q", "answer": "a"},\n"q"\n]', ":3: must be a JSON object, is str"),
    ("rows.json", b'[{"question": "q",\n"answer": "a"\n}\n\n,\n\n7]', ":7: must be a JSON object, is int"),
    (
        "rows.json",
        b'\n[{"question": "q", "answer": "a"},\n{"a": 1,\n"a": 2}]',
        ":3: is not valid JSON: key 'a' appears",
    ),
    ("rows.json", b'[{"question": "q", "answer": "a"},]', ":1: is not valid JSON: "),
    ("rows.json", b'{"data": []}', ": must be a list of objects"),
    ("rows.json", b'{"question": "q"}\n{"question": "q"}', ":2: is not valid JSON: Extra data"),
    ("rows.json", b"", ":1: is not valid JSON: "),
    ("rows.json", b" [ ] ", " (train) has no usable row: it is empty"),
    ("rows.csv", b"question,answer\nq,a\nq\n", ":3: has 1 cells, the header has 2"),
    ("rows.csv", b'question,answer\n"two\nlines",a\nq,a,b\n', ":4: has 3 cells, the header has 2"),
    ("rows.csv", b'question,answer\nq,a\nq,"never closed\n\n', ":3: is not valid CSV: unexpected end of data"),
    ("rows.csv", b'question,answer\nq,"a"b\n', ":2: is not valid CSV: "),
    ("rows.csv", b"question,answer\nq," + b"a" * 200_000, ":2: is not valid CSV: field larger than field limit"),
    ("rows.csv", b"question,answer,answer\nq,a,b\n", ": must have one column 'answer', has 'question', 'answer', 'ans"),
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
        read_problems(config(path, skip_bad_rows=skip_bad_rows))
    assert f"{path}{message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_problems(config(path))


def test_skipped_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(as_lines([GOOD, *(bad for bad, _ in BAD_ROWS), GOOD]))
    assert read_problems(config(path, skip_bad_rows=True)).train == [("Q: q\nA:", " a")] * 2
    count = len(BAD_ROWS)
    assert caplog.messages == [
        f"skipped {count} of {count + 2} rows of {path} (train): "
        f"first at {path}:2 (field 'answer' is missing (the row has 'question'))"
    ]


def test_good_rows_bring_no_warning(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "chorus"):
        read_problems(config(source, skip_bad_rows=True))
    assert not caplog.messages


def test_a_file_of_bad_rows_only_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "q"}] * 3)
    with pytest.raises(InputError, match=r"no usable row: all 3 are bad, the first at .*rows.jsonl:1 \(field 'answer'"):
        read_problems(config(path, skip_bad_rows=True))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_held_out_rows_and_training_rows_partition_the_source_in_its_order(source: Path, fraction: float) -> None:
    train, validation = read_problems(config(source, validation_split=fraction))
    assert len(validation) == min(max(1, round(20 * fraction)), 19)
    assert [problem for problem in PROBLEMS if problem in validation] == validation
    assert [problem for problem in PROBLEMS if problem not in validation] == train


def test_the_seed_alone_chooses_the_held_out_rows(source: Path) -> None:
    global_state = random.getstate()
    chosen = [
        read_problems(config(source, validation_split=0.3, seed=seed, debug_subset_size=size)).validation
        for seed in (0, 1)
        for size in (None, 5)
    ]
    assert chosen[0] == chosen[1] != chosen[2] == chosen[3]
    assert random.getstate() == global_state


def test_a_single_row_is_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD])
    assert read_problems(config(path, validation_split=0.5)) == ([("Q: q\nA:", " a")], [])


def test_the_debug_subset_is_the_first_training_rows(source: Path) -> None:
    everything = read_problems(config(source, validation_split=0.3))
    for size in (1, 5, 1000):
        subset = read_problems(config(source, validation_split=0.3, debug_subset_size=size))
        assert subset == (everything.train[:size], everything.validation)


@pytest.mark.parametrize(("splits", "held_out"), [("train test", "test"), ("test train validation", "validation")])
def test_a_source_with_held_out_rows_gives_up_none_of_its_training_rows(
    tmp_path: Path, splits: str, held_out: str
) -> None:
    parts = {split: [{"question": split, "answer": str(n)} for n in range(3)] for split in splits.split()}
    folder = tmp_path / "folder"
    datasets.DatasetDict({s: datasets.Dataset.from_list(part) for s, part in parts.items()}).save_to_disk(str(folder))
    train, validation = read_problems(config(folder, validation_split=0.5))
    assert train == [("Q: train\nA:", f" {n}") for n in range(3)]
    assert validation == [(f"Q: {held_out}\nA:", f" {n}") for n in range(3)]


def test_a_source_without_training_rows_is_refused(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "folder"))
    with pytest.raises(InputError, match=r"has no split 'train' \(it has 'test'\)"):
        read_problems(config(tmp_path / "folder"))


def test_a_folder_not_made_by_save_to_disk_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(InputError, match=r"key 'dataset_name': cannot load the folder .* written by save_to_disk"):
        read_problems(config(tmp_path))


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sources.txt").write_text("hello")
    with pytest.raises(InputError, match=r"must be a file ending in '\.jsonl', '\.json', '\.csv', '\.parquet', or"):
        read_problems(config(tmp_path / "sources.txt"))


@pytest.mark.parametrize(
    "name",
    [
        *("rows.jsonl", "nowhere/rows.json", "../rows", "./rows", "/nowhere/rows", "a/b/c", "folder\\rows", "~/rows"),
        *("here/rows", "two words", "http://example.org/rows"),
    ],
)
def test_a_missing_path_is_never_asked_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: pytest.fail(f"the hub was asked for {arguments}"))
    with pytest.raises(InputError, match=r"key 'dataset_name': .* does not exist; correct the path"):
        read_problems(config(name))


@pytest.mark.parametrize("name", ["gsm8k", "openai/gsm8k", "user-1/a_b.c-d"])
def test_a_hub_id_is_loaded_with_its_subset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: object) -> datasets.DatasetDict:
        asked.append(arguments)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_problems(config(name, dataset_subset="main")).train == PROBLEMS
    assert asked == [(name, "main")]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it"),
        ValueError("BuilderConfig 'x' not found.\nAvailable: ['main']"),
        DatasetNotFoundError("Dataset doesn't exist"),
        DatasetGenerationError("An error occurred"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_does_not_answer_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as refused:
        read_problems(config("openai/gsm8k", dataset_subset="x"))
    message = str(refused.value)
    assert message.startswith("key 'dataset_name': cannot load 'openai/gsm8k' (dataset_subset: 'x') from the hub: ")
    assert message.endswith("; correct the name or subset, or download it and name a local file")
    assert "\n" not in message


def test_a_subset_of_something_local_is_refused(source: Path) -> None:
    for name in (source, "arithmetic"):
        with pytest.raises(InputError, match="key 'dataset_subset': 'main' is for datasets of the hub"):
            read_problems(config(name, dataset_subset="main"))


def test_the_built_in_rows_do_not_depend_on_the_seed() -> None:
    train, validation = read_problems(config("arithmetic", seed=0))
    assert (len(train), len(validation)) == (sources.BUILT_IN_ROWS["train"], sources.BUILT_IN_ROWS["validation"])
    assert (train, validation) == read_problems(config("arithmetic", seed=1))
    assert not {problem.prompt for problem in train} & {problem.prompt for problem in validation}


def test_text_files_are_checked_without_a_model_library(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ROWS)
    code = (
        "import sys; from chorus.config import Config; from chorus.data.sources import read_problems\n"
        f"read_problems(Config(dataset_name={str(path)!r}))\n"
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
