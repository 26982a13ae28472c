"""docs/data.md: every example is read as it stands there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rows import TOKENIZER, read_rows
from ruamel.yaml import YAML

from chorus.config import Config

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCK = re.compile(r"```(text (?P<name>\S+)|yaml)\n(?P<body>.*?)```", re.DOTALL)


def examples() -> Iterator[tuple[dict[str, str], dict]]:
    """(files, keys) of each example: files, and then the keys that read them."""
    files: dict[str, str] = {}
    for block in BLOCK.finditer(PAGE.read_text()):
        if block["name"]:
            files[block["name"]] = block["body"]
        else:
            keys = YAML(typ="safe").load(block["body"])
            yield dict(files), keys
            files = (
                files if keys["dataset_name"] == "data" else {}
            )  # whose files the example after it reads, too


EXAMPLES = list(examples())


@pytest.mark.parametrize(("files", "keys"), EXAMPLES, ids=[keys["dataset_name"] for _, keys in EXAMPLES])
def test_an_example_is_read_to_the_last_row(
    files: dict[str, str], keys: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, body in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(body)
        assert len(body.splitlines()) <= 5
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
    assert {Path(name).suffix for files, _ in EXAMPLES for name in files} >= {
        ".jsonl",
        ".json",
        ".csv",
        ".tsv",
    }
    assert len(EXAMPLES) >= 12
