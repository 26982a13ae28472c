"""The benchmarks run anywhere, at shapes that take seconds."""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launching import environment, processes_of, wait_for
from preloaded import forked

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import modes as modes_benchmark  # noqa: E402
import overlap  # noqa: E402
import predict  # noqa: E402
import table  # noqa: E402
import table_rows  # noqa: E402
import verdicts  # noqa: E402
from case import Case  # noqa: E402
from results import Results  # noqa: E402

from chorus.mesh import Mesh  # noqa: E402

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


def test_the_process_that_rows_are_forked_from_imports_nothing_that_touches_a_gpu(tmp_path: Path):
    """peft does where bitsandbytes is installed, and no process forked after that can use CUDA."""
    (tmp_path / "bitsandbytes.py").write_text("raise SystemExit('bitsandbytes is imported')")
    imported = f"import sys, {', '.join(modes_benchmark.PRELOADED)}; print(*sys.modules, sep='\\n')"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", imported], env=environment(PYTHONPATH=path), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout.split()
    assert not {"peft", "deepspeed"} & {*result.stdout.split()}


@pytest.mark.launch
def test_a_row_of_the_table_is_measured_once_by_the_launcher_and_the_engine_it_names(tmp_path: Path):
    options = ("--rows", "fused zero2 x2 A=2", "--steps", "1", "--out", str(tmp_path))
    for _ in range(2):
        result = forked([sys.executable, "benchmarks/table.py"], *options)
        assert result.returncode == 0, result.stderr[-3000:]
    assert "tiny K=2 4x16 fused zero2 x2 A=2: measured" in result.stdout
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert "failed" not in row, row
    assert (row["mode"], row["engine"], row["processes"]) == ("fused", "zero2", 2)
    assert row["agent_tokens_per_second"] * row["ms_per_step"] == pytest.approx(1000 * 2 * 4 * 16)
    assert len(row["first_loss"]) == 2  # of both agents, one on each process
    assert "| tiny | 2 | 4 x 16 |  | fused | ZeRO-2 | 2 | 2 |" in (tmp_path / "table.md").read_text()


@pytest.mark.launch
def test_a_row_that_fails_says_why_and_one_that_is_given_up_leaves_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in environment(CHORUS_TEST_RUN=str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    alone, both = table_rows.rows(options(rows=["fused plain x1", "fused plain x2 A=1"]), table_rows.ON_CPU)
    unknown = {**alone, "model": "no/such/model"}
    sound, failed = table.measured([alone, unknown, alone], [], seconds=900, limit=900)
    assert sound["ms_per_step"] > 0
    assert "no/such/model" in failed["failed"]
    assert "Traceback" in failed["log"]
    assert list(table.measured([both], [], seconds=1.0, limit=900)) == []
    launched = subprocess.Popen(
        [*table.launcher(both), str(BENCHMARKS / "measure.py"), json.dumps([both]), "/dev/null"]
    )
    wait_for(lambda: len(processes_of(tmp_path)) == 3)
    table.end(launched)
    assert processes_of(tmp_path) == []


def options(**given: Any) -> argparse.Namespace:
    asked = {"rows": None, "processes": [1, 2, 4], "attention": "auto", "rank": 16, "steps": 1}
    asked["trace"] = False
    return argparse.Namespace(**asked | given)


def test_what_matters_most_comes_first_and_nothing_is_left_out():
    rows = table_rows.rows(options(processes=[1, 2, 4, 8]), table_rows.ON_GPU, table_rows.STRONG_ON_GPU)
    assert len(rows) == len({table.key_of(row) for row in rows})
    for name in table_rows.FIRST:
        assert len([row for row in rows if table_rows.is_named(row, name)]) <= 1, name
    places = [table_rows.rank_of(row) for row in rows]
    assert places == sorted(places)
    rest = [row["processes"] for row in rows if table_rows.rank_of(row) == len(table_rows.FIRST)]
    assert rest == sorted(rest)
    assert all(row["K"] % row["A"] == row["processes"] % row["A"] == 0 for row in rows)


def test_every_gpu_of_a_weak_row_has_as_much_to_do_and_strong_rows_have_one_batch():
    shape = table_rows.Shape("gemma-2-2b", 4, 4, 512, "none", 30)
    for case in table_rows.cases("fused", 8, [shape], []):
        assert case.K // case.A * case.B == 4 * 4
    strong = list(table_rows.cases("fused", 4, [], [shape]))
    assert [(case.A, case.B * 4 // case.A) for case in strong] == [(1, 4), (2, 4), (4, 4)]


def test_rows_of_one_engine_share_a_launch_and_under_zero2_of_one_mesh():
    rows = table_rows.rows(options(processes=[4], rows=["gemma-2-2b K=4 fused"]), table_rows.ON_GPU)
    by_mesh = {key: [row for row in rows if row["engine"] == key] for key in ("plain", "zero2")}
    assert [len(one) for one in table.launches(by_mesh["plain"])] == [len(by_mesh["plain"])]
    assert all(len({row["A"] for row in one}) == 1 for one in table.launches(by_mesh["zero2"]))


def test_rows_of_a_model_keep_to_one_gpu_and_nothing_runs_beside_a_row_that_needs_them_all():
    rows = table_rows.rows(options(processes=[1, 2]), table_rows.ON_GPU)
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


def test_what_is_not_hidden_is_what_nothing_computes_beside():
    kernels = [
        overlap.Kernel(0, 10, "matmul"),
        overlap.Kernel(8, 14, "ncclDevKernel_AllReduce"),  # 2 beside the product, 4 alone
        overlap.Kernel(16, 20, "adam"),
        overlap.Kernel(17, 19, "ncclDevKernel_AllGather"),  # hidden
    ]
    assert overlap.split(kernels) == {"step": 20, "communication": 8, "exposed": 4, "idle": 2}
    assert overlap.waiting([[5.0, 2.0], [3.0, 2.0]]) == 1.0  # the first process came 2 earlier, a mean of 1
    assert math.isnan(overlap.waiting([[1.0], []]))


GPU = predict.OneGpu(10.0, 0.01, 5.0, 0.001, adapter=10**9, zero2_ms=3.0, matmul_tflops=800.0)
LINKS = predict.Links(per_host=4, inside=100.0, between=50.0, latency_us=0.0, sort=math.inf, spread=0.0)


def predicted(K: int, B: int, A: int, D: int, engine: str = "plain", **links: float) -> predict.Prediction:
    return predict.predict(predict.Load(K, B, 100, engine), Mesh(A, D), GPU, LINKS._replace(**links))


def test_a_prediction_is_the_time_of_one_gpu_and_that_of_what_it_sends():
    """A billion numbers an agent at 100 GB/s; projections are nothing beside them."""
    one = predicted(4, 2, 1, 1)
    assert one.ms == pytest.approx(10 + 0.01 * 4 * 2 * 100)
    assert one.gib == pytest.approx(5 + 0.001 * 800 + 4 * 12 * 10**9 / 2**30)
    ddp = predicted(4, 2, 1, 4)
    assert ddp.ms - one.ms == pytest.approx(2 * 3 / 4 * 16e9 / 100e9 * 1000, rel=1e-4)
    zero = predicted(4, 2, 1, 4, "zero2")  # bf16, and gathers the weights
    assert zero.ms - one.ms == pytest.approx(3 + 3 * 3 / 4 * 8e9 / 100e9 * 1000, rel=1e-4)
    assert zero.gib == pytest.approx(5.8 + 4 * (2 + 14 / 4) * 10**9 / 2**30)
    spread = predicted(4, 8, 4, 1)  # four times the rows for an agent each: the same work
    assert spread.ms == pytest.approx(one.ms, rel=1e-4)
    assert spread.traffic.gradients == 0


def test_links_between_hosts_are_shared_by_the_groups_of_a_host():
    inside, between = predict.rates(Mesh(2, 4), LINKS)  # two hosts of four: each has the agents of one half
    assert (inside, between) == (100, 50 / 4)
    assert predict.rates(Mesh(1, 8), LINKS) == (50, 100)
    assert predict.rates(Mesh(8, 1), LINKS) == (100, 50)


def test_the_slowest_gpu_and_the_sort_of_the_distance_count():
    assert predict.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)  # exact
    one, two = predicted(4, 2, 1, 1), predicted(4, 4, 2, 1, spread=0.1)
    assert two.ms == pytest.approx(one.ms * (1 + 0.1 * predict.expected_maximum(2)), rel=1e-3)
    sorted_ms = predicted(4, 2, 1, 4, sort=1e-3).ms - predicted(4, 2, 1, 4).ms
    assert sorted_ms == pytest.approx(4 * 64 * (2 * 16) * 3 / 1e6 * 1000)


def test_one_gpu_is_read_from_the_rows_that_were_measured_and_its_own_prediction_is_exact():
    rows = [
        figures("fused", "plain", 1, 40.0, "gemma-2-2b", 4, 10.0),
        figures("fused", "plain", 1, 70.0, "gemma-2-2b", 8, 18.0),
        figures("fused", "zero2", 1, 42.0, "gemma-2-2b", 4, 10.0),
        figures("sequential", "plain", 1, 99.0, "gemma-2-2b", 4, 5.0),
    ]
    gpu = predict.one_gpu(rows, "gemma-2-2b", 512, "none")
    assert gpu.adapter == 20_766_720  # as PEFT counts rank 16 on all seven linears
    for row in rows[:3]:
        told = predict.predict(predict.Load(row["K"], 4, 512, row["engine"]), Mesh(), gpu, LINKS)
        assert told.ms == pytest.approx(row["ms_per_step"])
    assert predict.predict(predict.Load(8, 4, 512), Mesh(), gpu, LINKS).gib == pytest.approx(18.0)
    spread = figures("fused", "plain", 2, 41.0, "gemma-2-2b", 4, 10.0, A=2, B=8)
    assert "| gemma-2-2b K=4 8x512 fused plain x2 A=2 | 41.0 |" in predict.comparison([*rows, spread], LINKS)


@pytest.mark.launch
def test_a_row_that_the_end_cuts_off_is_left_out_and_not_said_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(table, "SHORTEST_ROW_S", 0.0)
    results = Results(tmp_path, "table", table.key_of, table.page)
    table.measure_all(
        table_rows.rows(options(), table_rows.ON_CPU), results, limit=100, deadline=time.monotonic() + 2
    )
    assert results.rows == []


def figures(
    mode: str,
    engine: str,
    processes: int,
    ms: float,
    model: str = "tiny",
    K: int = 2,
    gib: float | None = None,
    A: int = 1,
    B: int | None = None,
):
    case = (
        Case(model, mode, K, B or 4, 512, A=A) if model != "tiny" else Case(model, mode, K, B or 2, 16, A=A)
    )
    of_the_launch = {"rank": 16, "engine": engine, "processes": processes}
    rate = K // A * case.B * case.T * processes / ms * 1000
    speed = {"ms_per_step": ms, "agent_tokens_per_second": rate, "matmul_tflops": 800.0}
    return {**case._asdict(), **of_the_launch, **speed, "peak_gib": gib, "first_loss": [5.0, 5.0]}


def verdict(rows: list[dict[str, Any]], words: str) -> bool | None:
    (found,) = [one for one in verdicts.checks(rows) if words in one.claim]
    return found.holds


def test_rows_are_compared_with_the_plain_engine_and_with_one_process():
    rows = [figures("fused", *of) for of in (("plain", 1, 100.0), ("zero2", 1, 104.0), ("zero2", 4, 130.0))]
    one, zero, four = verdicts.with_ratios(
        [*rows, {**rows[0], "mode": "parallel", "failed": "out of memory"}]
    )[:3]
    assert (one["over_plain"], one["weak"]) == (None, None)
    assert (zero["over_plain"], zero["weak"]) == (pytest.approx(0.04), None)
    assert (four["over_plain"], four["weak"]) == (None, pytest.approx(0.8))
    assert verdict(rows, "ZeRO-2 costs") is True
    assert verdict(rows, "of DDP and ZeRO-2") is False
    assert verdict([rows[0], figures("fused", "zero2", 1, 106.0)], "ZeRO-2 costs") is False
    assert verdict([rows[0]], "ZeRO-2 costs") is verdict([rows[0]], "of DDP and ZeRO-2") is None
    assert verdict([rows[0], {**rows[1], "first_loss": [5.0, 5.2]}], "the first losses agree") is False


def test_agents_over_processes_are_compared_with_one_process_of_the_same_load_and_of_the_same_batch():
    alone, double = figures("fused", "plain", 1, 100.0), figures("fused", "plain", 1, 196.0, B=4)
    spread = figures("fused", "plain", 2, 101.0, A=2, B=4)  # an agent each, over the rows of both
    *_, row = verdicts.with_ratios([alone, double, spread])
    assert row["weak"] == pytest.approx(100 / 101)  # as many agents times rows as `alone`
    assert row["strong"] == pytest.approx(196 / 101)  # the batch of `double`
    assert verdict([alone, spread], "of agents over all") is True


def test_rows_of_a_faster_machine_are_compared_by_its_large_product():
    alone, faster = figures("fused", "plain", 1, 100.0), figures("fused", "plain", 4, 98.0)
    *_, row = verdicts.with_ratios([alone, {**faster, "matmul_tflops": 816.0}])
    assert row["weak"] == pytest.approx(100 / 98 * 800 / 816)


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
