"""Where the profiler says that time went, on a clock that only
goes where a test spends time; never on a real one."""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from clock import Clock
from launching import zero2
from preloaded import forked
from toy import toy_agents, toy_batch

import train as script
from chorus import spans
from chorus.checkpoint.store import Checkpointer
from chorus.config import Config
from chorus.data.batches import Batch, StepBatch
from chorus.model import agents as agents_module
from chorus.model.agents import Agents, Mode
from chorus.model.kernels import cuda_graphs as graphs
from chorus.monitoring.metrics import Meter
from chorus.monitoring.profiler import profiling, summary
from chorus.monitoring.run_log import RunLog
from chorus.spans import span
from chorus.training import objective
from chorus.training.engine import start_engine
from chorus.training.optimizer import AgentwiseAdamW

K, MICRO = 3, 2


class Told(RunLog):
    """Keeps what the profiler tells."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[tuple[int, Mapping[str, Any], Sequence[str]]] = []

    def profile(self, step: int, report: Mapping[str, Any], lines: Sequence[str]) -> None:
        self.reports.append((step, report, lines))


def steps_of(count: int, spend: Callable[[int], None] = lambda step: None) -> Iterator[StepBatch]:
    for step in range(count):
        spend(step)
        batches = [toy_batch(seed=MICRO * step + micro) for micro in range(MICRO)]
        yield StepBatch(batches, sum(len(batch.target_rows_N) for batch in batches), 8, 0)


def run(
    folder: Path, mode: Mode, *, steps: Iterator[StepBatch], count: int, **settings: Any
) -> tuple[Told, Agents]:
    """train.py's own loop over toy agents; the shape of a step is the same in all of these tests."""
    config = Config(
        **{
            "num_agents": K,
            "batch_size": 4,
            "gradient_accumulation_steps": MICRO,
            "lambda_sw": 0.2,
            **settings,
        },
        output_dir=str(folder),
    )
    told, agents = Told(), toy_agents(mode, num_agents=K)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    engine = start_engine(accelerator, agents, config)
    script.train(engine, steps, 0, count, config, Checkpointer(folder, config, {}), told)
    return told, agents


def after(function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        act()
        return result

    return wrapped


SPENT = {
    **{"data_loading": 1.0, "data_transfer": 2.0, "pass": 4.0, "task_loss": 8.0, "swd_loss": 16.0},
    **{"backward_pass": 32.0, "optimizer_step": 64.0, "other": 128.0},
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that each part of the step moves on by an amount of its own."""
    clock = Clock()
    monkeypatch.setattr(spans, "perf_counter", clock)

    def spend_in(owner: Any, name: str, part: str) -> None:
        monkeypatch.setattr(owner, name, after(getattr(owner, name), lambda: clock.spend(SPENT[part])))

    spend_in(Batch, "to", "data_transfer")
    spend_in(agents_module, "trunk_of", "pass")
    spend_in(agents_module, "token_nll", "task_loss")
    spend_in(objective, "sliced_wasserstein", "swd_loss")
    spend_in(Accelerator, "backward", "backward_pass")
    spend_in(AgentwiseAdamW, "step", "optimizer_step")
    spend_in(Meter, "add", "other")
    return clock


@pytest.mark.parametrize("mode", ["fused", "sequential", "parallel"])
def test_every_part_has_the_time_that_was_spent_in_it_and_no_other(mode: Mode, clock: Clock, tmp_path: Path):
    def load(step: int) -> None:
        clock.spend(SPENT["data_loading"] if step else 1000.0)  # what is slow in the first step is warm-up

    told, _ = run(tmp_path, mode, steps=steps_of(4, load), count=4, profile_steps=2)
    [(step, report, _)] = told.reports
    passes = 1 if mode == "fused" else K
    again = K if mode == "sequential" else 0  # passes that backward makes again
    expected = {
        "data_loading": (1.0, 2),
        "data_transfer": (2.0, 2 * MICRO),
        "forward_pass": (4.0 * passes, 2 * MICRO),
        **{f"forward_pass.agent_{agent}": (4.0, 2 * MICRO) for agent in range(K) if mode != "fused"},
        "loss_calculation": (8.0 * passes + 16.0, 2 * MICRO),
        "loss_calculation.task_loss": (8.0, 2 * MICRO * passes),
        "loss_calculation.swd_loss": (16.0, 2 * MICRO),
        "backward_pass": (32.0 + again * (4.0 + 8.0), 2 * MICRO),
        "optimizer_step": (64.0, 2),
        "other": (128.0, 2),
    }
    assert step == 3
    assert (report["steps"], report["warm_up_steps"]) == (2, 1)
    assert {name: (part["seconds"], part["calls"]) for name, part in report["parts"].items()} == expected
    whole = sum(seconds * calls for name, (seconds, calls) in expected.items() if "." not in name) / 2
    assert report["step"]["seconds"] == whole
    assert report["warm_up_seconds"] == whole + 999
    assert sum(part["share"] for name, part in report["parts"].items() if "." not in name) == pytest.approx(1)
    assert report["agent_tokens_per_second"] == pytest.approx(MICRO * K * 4 * 10 / whole)


def test_a_step_in_which_a_pass_is_recorded_warms_up(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def load(step: int) -> None:
        clock.spend(1.0)
        if step == 2:
            with span("recording"):
                clock.spend(500.0)

    told, _ = run(tmp_path, "fused", steps=steps_of(4, load), count=4, profile_steps=3)
    [(step, report, lines)] = told.reports
    assert (step, report["steps"], report["warm_up_steps"]) == (4, 2, 2)
    assert report["parts"]["data_loading"]["seconds"] == 1
    assert "recording" not in report["parts"]
    assert lines[-2].endswith("in 2 steps, not in the averages")
    assert graphs.span is span


def test_the_summary_is_for_people():
    part = {"seconds": 0.0234, "calls": 5, "share": 0.25, "slowest_process_seconds": 0.03}
    report = {
        **{"parts": {"data_transfer": part, "forward_pass.agent_0": part}, "step": part, "processes": 1},
        **{"agent_tokens_per_second": 12345.6, "useful_tflops_per_process": 1.5},
        **{"warm_up_seconds": 2.5, "warm_up_steps": 1},
    }
    assert summary(report, 5) == [
        "--- Performance Summary at Step 5 ---",
        "data_transfer: 0.0234s (avg over 5 calls), 25.0% of the step",
        "forward_pass.agent_0: 0.0234s (avg over 5 calls), 25.0% of the step",
        "step: 0.0234s (avg over 5 calls)",
        "agent-tokens/s: 12,346",
        "useful TFLOP/s: 1.5",
        "warm-up: 2.5000s in 1 steps, not in the averages",
    ]
    of_two = summary({**report, "processes": 2}, 5)
    assert of_two[1].endswith("25.0% of the step, 0.0300s on the slowest process")
    assert "useful TFLOP/s of a process: 1.5" in of_two


def test_without_a_profile_no_span_is_timed(tmp_path: Path):
    nothing: Any = None
    with profiling(Config(), nothing, nothing, tmp_path, 0, 1) as after_step:
        after_step(nothing)
        assert span("step") is span("forward_pass")


@pytest.fixture(scope="module")
def traced_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Agents]]:
    """The folder of a traced run, and the agents of the same run plain, timed and traced."""
    asked = {"plain": {}, "timed": {"profile_steps": 1}, "traced": {"profile_trace": True}}
    folder = tmp_path_factory.mktemp("runs")
    agents = {
        name: run(folder / name, "sequential", steps=steps_of(2), count=2, **settings)[1]
        for name, settings in asked.items()
    }
    return folder / "traced" / "profile", agents


@pytest.mark.parametrize("how", ["timed", "traced"])
def test_profiling_changes_nothing_in_what_is_learnt(how: str, traced_run: tuple[Path, dict[str, Agents]]):
    _, agents = traced_run
    for identity, tensor in agents["plain"].adapter_tensors().items():
        assert torch.equal(tensor, agents[how].adapter_tensors()[identity]), identity
    assert span("step") is span("forward_pass"), "somebody still listens"


def test_the_trace_names_steps_parts_agents_and_what_is_made_again(
    traced_run: tuple[Path, dict[str, Agents]],
):
    with gzip.open(traced_run[0] / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name for name in named if name.startswith("step")} == {"step 2"}
    once_a_step = {"data_loading", "optimizer_step"}
    assert {name: named.count(name) for name in once_a_step} == dict.fromkeys(once_a_step, 1)
    assert named.count("swd_loss") == named.count("backward_pass") == MICRO
    assert [named.count(f"forward_pass.agent_{agent}") for agent in range(K)] == [2 * MICRO] * K
    assert named.count("checkpoint") == 1


def test_the_flame_graph_and_the_operators_are_of_the_traced_steps(
    traced_run: tuple[Path, dict[str, Agents]],
):
    page = (traced_run[0] / "flame_graph.html").read_text()
    for name in (
        "step",
        "backward_pass",
        "forward_pass.agent_2",
        "Gemma2MLP",
        "chorus::lora_linear",
        "aten::bmm",
    ):
        assert f'["{name}", ' in page, name
    table = (traced_run[0] / "top_operators.txt").read_text()
    assert "  aten::" in table  # which ones come first is a matter of time
    assert ".py(" not in table
    assert "nn.Module" not in table


def test_a_run_too_short_for_its_profile_says_so_and_tells_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    told, _ = run(tmp_path, "fused", steps=steps_of(2), count=2, profile_steps=5, profile_trace=True)
    assert "profiling needs 7 steps, one to warm up, and 2 are left" in caplog.text
    [(step, report, _)] = told.reports
    assert (step, report["steps"]) == (2, 1)
    assert not (tmp_path / "profile").exists()
    told, _ = run(tmp_path / "shorter", "fused", steps=steps_of(1), count=1, profile_steps=5)
    assert "nothing was profiled: all of 1 steps warmed up" in caplog.text
    assert not told.reports


@pytest.mark.parametrize("settings", [{"profile_steps": 3}, {"profile_trace": True}])
def test_a_run_that_fails_leaves_nobody_listening_and_no_trace(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    left = [1, 2]
    monkeypatch.setattr(Meter, "add", after(Meter.add, left.pop))
    with pytest.raises(IndexError) as failure:  # held, and the loop's frame with it
        run(tmp_path, "fused", steps=steps_of(4), count=4, **settings)
    assert span("step") is span("forward_pass"), failure
    assert not (tmp_path / "profile").exists()


@pytest.mark.launch
def test_under_two_zero2_processes_the_engines_step_is_the_optimizers_time_and_no_other_parts(tmp_path: Path):
    """The workers' clock goes in AdamW's steps alone, which
    DeepSpeed takes inside of its engine, agent after agent."""
    settings = (
        "debug_subset_size=200",
        "eval_samples=0",
        "num_agents=2",
        "lambda_sw=0.01",
        "parallel_mode=sequential",
        "max_train_steps=4",
        "batch_size=4",
    )
    command = [*zero2(2)[:-1], "tests/helpers/profiler_worker.py"]
    result = forked(command, f"output_dir={tmp_path}", *settings, "profile_steps=2", "profile_trace=true")
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [profile] = [row["profile"] for row in rows if "profile" in row]
    spent = {name: part["seconds"] for name, part in profile["parts"].items()}
    assert spent == {
        **dict.fromkeys(["data_loading", "data_transfer", "forward_pass", "communication"], 0),
        **dict.fromkeys([f"loss_calculation{detail}" for detail in ("", ".task_loss", ".swd_loss")], 0),
        **dict.fromkeys(["forward_pass.agent_0", "forward_pass.agent_1", "backward_pass", "other"], 0),
        "optimizer_step": 1,
    }
    assert (
        profile["parts"]["optimizer_step"]["slowest_process_seconds"] == 2
    )  # the second one's clock is twice as fast
    assert (profile["steps"], profile["step"]["seconds"], profile["processes"]) == (2, 1, 2)
    printed, step = (
        result.stderr,
        "1.0000s (avg over 2 calls), 100.0% of the step, 2.0000s on the slowest process",
    )
    assert printed.count("--- Performance Summary at Step 3 ---") == 1
    assert f"\noptimizer_step: {step}\n" in printed
    assert re.search(r"\n\[Step 3\] CPU Memory - Resident: \d+\.\d\dGB, Max Resident: \d+\.\d\dGB\n", printed)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        *("flame_graph.html", "top_operators.txt", "trace.json.gz")
    ]
