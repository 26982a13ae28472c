"""docs/data.md: every example is read as it stands there."""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rows import TOKENIZER, read_rows
from ruamel.yaml import YAML

from chorus.config import Config

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCK = re.compile(r"```(text (?P<name>\S+)|(?P<python>python)|yaml)\n(?P<body>.*?)```", re.DOTALL)
KEEPS = {"data", "rows.parquet"}  # sources whose files the example after theirs reads, too


def examples() -> Iterator[tuple[dict[str, str], dict]]:
    """(files, keys) of each example: files, and then the keys that read them."""
    files: dict[str, str] = {}
    for block in BLOCK.finditer(PAGE.read_text()):
        if block["name"] or block["python"]:
            files[block["name"] or "make.py"] = block["body"]
        else:
            keys = YAML(typ="safe").load(block["body"])
            yield dict(files), keys
            files = files if keys["dataset_name"] in KEEPS else {}


EXAMPLES = list(examples())


@pytest.mark.parametrize(("files", "keys"), EXAMPLES, ids=[keys["dataset_name"] for _, keys in EXAMPLES])
def test_an_example_is_read_to_the_last_row(
    files: dict[str, str], keys: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, body in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(gzip.compress(body.encode()) if name.endswith(".gz") else body.encode())
        assert len(body.splitlines()) <= 5
        if name == "make.py":
            exec(body, {})
    rows = read_rows(Config.model_validate({"validation_split": 0.0, **keys}))
    answers = [TOKENIZER.decode(sample.ids[sample.is_target]).strip() for sample in rows.train]
    held_out = [
        TOKENIZER.decode(row.answer, skip_special_tokens=True).strip()
        for row in rows.held_out(TOKENIZER, 9).rows
    ]
    found = [answer.removesuffix("<eos>") for answer in answers] + held_out
    assert found == [str(answer) for answer in (5, 6, 7, 8) if str(answer) in found]
    assert found, "no row was read"


def test_every_format_that_is_read_has_its_example() -> None:
    shown = {"".join(Path(name).suffixes) for files, _ in EXAMPLES for name in files}
    sources = {keys["dataset_name"] for _, keys in EXAMPLES}
    assert shown >= {".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz"}
    assert sources >= {
        "rows.parquet",
        "folder",
        "data",
        "data/train-*.jsonl",
    }  # the last two: a folder, a glob
    whole = PAGE.read_text()
    for word in ('"messages"', '"conversations"', '"prompt": [', '"system"', '"tools"', '"instruction"'):
        assert word in whole
