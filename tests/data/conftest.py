"""The same rows in every format that is read."""

from pathlib import Path

import pytest
from files_made import ROWS, write

FORMATS = ["rows.jsonl", "rows.ndjson", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "folder"]
FORMATS += ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz", "rows.tsv.gz"]


@pytest.fixture(params=FORMATS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / request.param, ROWS)
