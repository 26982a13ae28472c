"""`metrics.jsonl` when a run resumes: rows of the steps that are done stay, and other lines end no run."""

import json
import os
from pathlib import Path

import pytest

from chorus.checkpoint.metrics_file import rows_up_to
from chorus.checkpoint.untrusted_files import Damaged

ROWS = [json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(1, 6)]


def test_later_rows_and_a_last_line_cut_short_are_dropped(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    for end in ("", '{"step": 6, "lo', "{"):
        file.write_text("".join(ROWS) + end)
        assert rows_up_to(file, 3) == "".join(ROWS[:3])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "x",
        "[]",
        "1",
        "null",
        '{"loss": 1}',
        '{"step": "1"}',
        '{"step": -1}',
        '{"step": NaN}',
        "\udcff",
        "[" * 9999,
    ],
)
def test_a_line_that_is_not_a_row_is_left_out_with_a_warning_and_kept_beside(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes("".join([ROWS[0], line + "\n", ROWS[1]]).encode(errors="surrogateescape"))
    assert rows_up_to(file, 9) == ROWS[0] + ROWS[1]
    assert f"{file}: line 2 is not a row of a run and is left out" in caplog.text
    assert ROWS[0] in (tmp_path / "metrics.jsonl.damaged").read_text()


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(Damaged, match="not a regular file"):
        rows_up_to(tmp_path / "metrics.jsonl", 3)
