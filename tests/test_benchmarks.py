"""The benchmarks run anywhere, at shapes that take seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_mode_and_baseline_is_measured_after_their_losses_agreed(tmp_path: Path):
    command = [sys.executable, str(BENCHMARKS / "modes.py"), "--model", "tiny", "--shapes", "2x1x8", "--steps", "1"]
    result = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    written = json.loads((tmp_path / "modes.json").read_text())
    modes = ["fused", "sequential", "parallel", "switching", "tuned switching"]
    assert [row["mode"] for row in written["rows"]] == modes
    assert written["equality"].startswith(f"losses of {', '.join(modes)} agree to ")
    for row in written["rows"]:
        assert (row["model"], row["K"], row["B"], row["T"]) == ("tiny", 2, 1, 8)
        assert row["ms_per_step"] > 0
        assert row["agent_tokens_per_second"] * row["ms_per_step"] == pytest.approx(1000 * 2 * 1 * 8)
    table = (tmp_path / "modes.md").read_text()
    assert all(f"| tiny | {mode} | 2 | 1 x 8 |" in table for mode in modes)
