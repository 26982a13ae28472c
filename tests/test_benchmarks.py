"""The benchmarks run anywhere, at shapes that take seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODES = ["fused", "sequential", "parallel", "switching", "tuned switching"]


def bench(out: Path, *options: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / "modes.py"), "--model", "tiny", "--steps", "1", "--out", str(out)]
    subprocess.run([*command, *options], capture_output=True, text=True, timeout=300, check=False)
    return json.loads((out / "modes.json").read_text())


def test_every_row_is_measured_where_its_losses_agree_and_one_that_fails_takes_no_other_with_it(tmp_path: Path):
    written = bench(tmp_path, "--shapes", "2x4x32", "--mixed")
    apart, packed = ([row for row in written["rows"] if row["mixed"] and row["packing"] == value] for value in (0, 1))
    rows = [row for row in written["rows"] if not row["mixed"]]
    assert [row["mode"] for row in rows] == MODES
    assert written["equality"].startswith(f"losses of {', '.join(MODES)} agree to ")
    for row in rows:
        assert (row["model"], row["K"], row["B"], row["T"]) == ("tiny", 2, 4, 32)
        assert row["ms_per_step"] > 0
        assert row["agent_tokens_per_second"] * row["ms_per_step"] == pytest.approx(1000 * 2 * 4 * 32)
    table = (tmp_path / "modes.md").read_text()
    assert all(f"| tiny | {mode} | 2 | 4 x 32 |" in table for mode in MODES)
    for one, other in zip(apart, packed, strict=True):
        assert (one["rows_of_the_batch"], other["rows_of_the_batch"]) == ([4, 32], [3, 32])
        assert other["loss_differs"] < 1e-5

    # A row measured again takes its old self's place, and one that fails stands as that, with the others beside it.
    rows[1]["first_loss"] = [1.0, 1.0]  # sequential: the first row that a new measurement is compared with
    (tmp_path / "modes.json").write_text(json.dumps({"rows": rows[1:]}))
    again = bench(tmp_path, "--shapes", "2x4x32", "--only", "fused")["rows"]
    assert [row["mode"] for row in again] == [*MODES[1:], "fused"]
    assert again[-1]["failed"].startswith("ValueError: losses [")
    assert again[:-1] == rows[1:]
    assert "| tiny | fused | 2 | 4 x 32 |  |  | failed |" in (tmp_path / "modes.md").read_text()
