"""The benchmarks run anywhere, at shapes that take seconds."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import PATIENCE_S, environment, processes_of, wait_for
from preloaded import forked

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import table  # noqa: E402
import verdicts  # noqa: E402
from case import Case  # noqa: E402
from results import Results  # noqa: E402

ALL = ["fused", "sequential", "parallel", "switching", "tuned switching"]


def bench(out: Path, *options: str) -> dict:
    forked(
        [sys.executable, "benchmarks/modes.py"],
        "--model",
        "tiny",
        "--steps",
        "1",
        "--out",
        str(out),
        *options,
    )
    return json.loads((out / "modes.json").read_text())


@pytest.mark.parametrize(
    ("modes", "more"),
    [(["fused", "switching"], ()), pytest.param(ALL, ("--mixed",), marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_every_row_is_measured_where_its_losses_agree_and_one_that_fails_takes_no_other_with_it(
    modes: list[str], more: tuple[str, ...], tmp_path: Path
):
    written = bench(tmp_path, "--shapes", "2x4x32", "--modes", *modes, *more)
    apart, packed = (
        [row for row in written["rows"] if row["mixed"] and row["packing"] == value] for value in (0, 1)
    )
    rows = [row for row in written["rows"] if not row["mixed"]]
    assert [row["mode"] for row in rows] == modes
    assert f"losses of {', '.join(modes)} agree to " in (tmp_path / "modes.md").read_text()
    for row in rows:
        assert (row["model"], row["K"], row["B"], row["T"]) == ("tiny", 2, 4, 32)
        assert row["ms_per_step"] > 0
        assert row["agent_tokens_per_second"] * row["ms_per_step"] == pytest.approx(1000 * 2 * 4 * 32)
    table = (tmp_path / "modes.md").read_text()
    assert all(f"| tiny | {mode} | 2 | 4 x 32 |" in table for mode in modes)
    assert len(apart) == len(packed) == (3 if more else 0)
    for one, other in zip(apart, packed, strict=True):
        assert (one["rows_of_the_batch"], other["rows_of_the_batch"]) == ([4, 32], [3, 32])
        assert other["loss_differs"] < 1e-5

    # A row measured again takes its old self's place, and one that fails stands as that, with the others
    # beside it.
    rows[1]["first_loss"] = [1.0, 1.0]  # the first row that a new measurement is compared with
    (tmp_path / "modes.json").write_text(json.dumps({"rows": rows[1:]}))
    again = bench(tmp_path, "--shapes", "2x4x32", "--only", "fused")["rows"]
    assert [row["mode"] for row in again] == [*modes[1:], "fused"]
    assert again[-1]["failed"].startswith("ValueError: losses [")
    assert again[:-1] == rows[1:]
    assert "| tiny | fused | 2 | 4 x 32 |  |  | failed |" in (tmp_path / "modes.md").read_text()


@pytest.mark.launch
def test_a_row_of_the_table_is_measured_once_by_the_launcher_and_the_engine_it_names(tmp_path: Path):
    options = ("--rows", "fused zero2 x2", "--steps", "1", "--out", str(tmp_path))
    for _ in range(2):
        result = forked([sys.executable, "benchmarks/table.py"], *options)
        assert result.returncode == 0, result.stderr[-3000:]
    assert "tiny K=2 2x16 fused zero2 x2: measured" in result.stdout
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert "failed" not in row, row
    assert (row["mode"], row["engine"], row["processes"]) == ("fused", "zero2", 2)
    assert row["agent_tokens_per_second"] * row["ms_per_step"] == pytest.approx(1000 * 2 * 2 * 16 * 2)
    assert "| tiny | 2 | 2 x 16 |  | fused | ZeRO-2 | 2 |" in (tmp_path / "table.md").read_text()


@pytest.mark.launch
def test_a_row_that_fails_says_why_and_one_that_is_given_up_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment(CHORUS_TEST_RUN=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    alone, both = table.rows(options(rows=["fused plain x1", "fused plain x2"]), table.ON_CPU)
    failed = table.measured({**alone, "model": "no/such/model"}, [], seconds=900)
    assert failed is not None
    assert "no/such/model" in failed["failed"]
    assert "Traceback" in failed["log"]
    assert table.measured(both, [], seconds=1.0) is None
    launched = subprocess.Popen(
        [*table.launcher(both), str(BENCHMARKS / "measure.py"), json.dumps(both), "/dev/null"]
    )
    wait_for(lambda: len(processes_of(tmp_path)) == 3)
    table.end(launched)
    assert processes_of(tmp_path) == []


def options(**given: Any) -> argparse.Namespace:
    asked = {"rows": None, "processes": [1, 2, 4], "attention": "auto", "rank": 16, "steps": 1}
    return argparse.Namespace(**asked | given)


def test_what_matters_most_comes_first_and_nothing_is_left_out():
    rows = table.rows(options(), table.ON_GPU)
    assert len(rows) == len({table.key_of(row) for row in rows}) == 4 * 3 * 2 * 3
    first, rest = rows[: len(table.FIRST)], rows[len(table.FIRST) :]
    for name, row in zip(table.FIRST, first, strict=True):
        assert [other for other in rows if table.is_named(other, name)] == [row]
    assert [row["processes"] for row in rest] == sorted(row["processes"] for row in rest)


def test_rows_of_a_model_keep_to_one_gpu_and_nothing_runs_beside_a_row_that_needs_them_all():
    rows = table.rows(options(processes=[1, 2]), table.ON_GPU)
    waves = list(table.waves(rows, ["5", "7"]))
    assert sorted(map(table.name_of, rows)) == sorted(
        table.name_of(row) for wave in waves for lane, _ in wave for row in lane
    )
    for wave in waves:
        for lane, gpus in wave:
            for row in lane:
                assert gpus == (
                    [{"gemma-2-2b": "5", "gemma-2-9b": "7"}[row["model"]]] if len(wave) == 2 else ["5", "7"]
                )
                assert row["processes"] == len(gpus)
    assert [len(wave) for wave in waves] == [2, 1, 2, 1]
    on_four = list(table.waves(rows, ["0", "1", "2", "3"]))
    for wave in on_four:
        used = [gpu for lane, gpus in wave for gpu in gpus if lane]
        assert len(used) == len(set(used))
    assert [[gpus for _, gpus in wave] for wave in on_four][1] == [["0", "1"], ["2", "3"]]


@pytest.mark.launch
def test_a_row_that_the_end_cuts_off_is_left_out_and_not_said_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(table, "SHORTEST_ROW_S", 0.0)
    results = Results(tmp_path, "table", table.key_of, table.page)
    table.measure_all(table.rows(options(), table.ON_CPU), results, limit=100, deadline=time.monotonic() + 2)
    assert results.rows == []


def figures(
    mode: str,
    engine: str,
    processes: int,
    ms: float,
    model: str = "tiny",
    K: int = 2,
    gib: float | None = None,
):
    case = Case(model, mode, K, 4, 512) if model != "tiny" else Case(model, mode, K, 2, 16)
    of_the_launch = {"rank": 16, "engine": engine, "processes": processes}
    return {**case._asdict(), **of_the_launch, "ms_per_step": ms, "peak_gib": gib, "first_loss": [5.0, 5.0]}


def verdict(rows: list[dict[str, Any]], words: str) -> bool | None:
    (found,) = [one for one in verdicts.checks(rows) if words in one.claim]
    return found.holds


def test_rows_are_compared_with_the_plain_engine_and_with_one_process():
    rows = [figures("fused", *of) for of in (("plain", 1, 100.0), ("zero2", 1, 104.0), ("zero2", 4, 130.0))]
    one, zero, four = verdicts.with_ratios(
        [*rows, {**rows[0], "mode": "parallel", "failed": "out of memory"}]
    )[:3]
    assert (one["over_plain"], one["scaling"]) == (None, None)
    assert (zero["over_plain"], zero["scaling"]) == (pytest.approx(0.04), None)
    assert (four["over_plain"], four["scaling"]) == (None, pytest.approx(0.8))
    assert verdict(rows, "ZeRO-2 costs") is True
    assert verdict(rows, "several processes") is False
    assert verdict([rows[0], figures("fused", "zero2", 1, 106.0)], "ZeRO-2 costs") is False
    assert verdict([rows[0]], "ZeRO-2 costs") is verdict([rows[0]], "several processes") is None
    assert verdict([rows[0], {**rows[1], "first_loss": [5.0, 5.2]}], "the first losses agree") is False


def test_the_large_base_fits_where_its_fullest_row_does():
    gb = 1e9 / 2**30
    below = [figures("fused", "zero2", processes, 1.0, "gemma-2-9b", 8, 39.9 * gb) for processes in (1, 2)]
    assert verdict(below, "under 40 GB") is True
    above = figures("fused", "plain", 1, 1.0, "gemma-2-9b", 4, 40.1 * gb)
    assert verdict([*below, above], "under 40 GB") is False
    assert verdict([above | {"model": "gemma-2-2b"}], "under 40 GB") is None


def test_served_clients_and_stock_generation_are_measured_side_by_side(tmp_path: Path):
    options = ("--model", "tiny", "--small", "--agents", "2", "--out", str(tmp_path))
    result = forked([sys.executable, "benchmarks/serving.py"], *options)
    assert result.returncode == 0, result.stderr[-2000:]
    written = json.loads((tmp_path / "serving.json").read_text())
    assert written["served"].keys() == written["stock"].keys() == {"1", "3"}
    for row in [*written["served"].values(), *written["stock"].values()]:
        assert row["first_token_s"] > 0
        assert row["tokens_per_s"] > 0
