"""The benchmarks run anywhere, at shapes that take seconds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from launching import environment

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import table  # noqa: E402

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


@pytest.mark.launch
def test_a_row_of_the_table_is_measured_once_by_the_launcher_and_the_engine_it_names(tmp_path: Path):
    command = [sys.executable, str(BENCHMARKS / "table.py"), "--rows", "fused zero2 x2", "--steps", "1"]
    for _ in range(2):
        result = subprocess.run(
            [*command, "--out", str(tmp_path)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
    assert "tiny K=2 2x16 fused zero2 x2: measured" in result.stdout
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert "failed" not in row, row
    assert (row["mode"], row["engine"], row["processes"]) == ("fused", "zero2", 2)
    assert row["agent_tokens_per_second"] * row["ms_per_step"] == pytest.approx(1000 * 2 * 2 * 16 * 2)
    assert "| tiny | 2 | 2 x 16 |  | fused | ZeRO-2 | 2 |" in (tmp_path / "table.md").read_text()


def figures(mode: str, engine: str, processes: int, ms: float) -> dict[str, Any]:
    row = dict(zip(table.KEY, ("tiny", 2, 2, 16, 16, False, mode, engine, processes), strict=True))
    return {**row, "ms_per_step": ms, "peak_gib": None, "first_loss": 5.0}


def test_rows_are_compared_with_the_plain_engine_and_with_one_process():
    rows = [figures("fused", *of) for of in (("plain", 1, 100.0), ("zero2", 1, 104.0), ("zero2", 4, 130.0))]
    one, zero, four = table.with_ratios([*rows, {**rows[0], "mode": "parallel", "failed": "out of memory"}])[:3]
    assert (one["over_plain"], one["scaling"]) == (None, None)
    assert (zero["over_plain"], zero["scaling"]) == (pytest.approx(0.04), None)
    assert (four["over_plain"], four["scaling"]) == (None, pytest.approx(0.8))
    assert any("+4.0%" in line and line.endswith("reached") for line in table.checks(rows))
    assert any(line.endswith("missed") for line in table.checks([rows[0], figures("fused", "zero2", 1, 106.0)]))
