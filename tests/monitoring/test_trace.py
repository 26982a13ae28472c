"""From a trace's events to stacks and sums: what nests, and that no time is lost or counted twice."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chorus.errors import RunError
from chorus.monitoring.trace import operator_table, stacks, tracing, write_trace
from chorus.spans import span


def event(category: str, name: str, begin: float, end: float, thread: int = 1, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": end - begin,
        "tid": thread,
        "args": args,
    }


EVENTS = [
    event("user_annotation", "step 7", 0, 100),
    event("user_annotation", "forward_pass", 0, 50),
    event("python_function", "chorus/agents.py(1): forward", 1, 49),
    event("python_function", "nn.Module: Layer_0", 5, 20),
    event("cpu_op", "aten::mm", 6, 16),
    event("cuda_runtime", "cudaLaunchKernel", 12, 15, correlation=3),
    event("python_function", "nn.Module: Layer_1", 20, 40),
    event("cpu_op", "aten::mm", 25, 35),
    event("user_annotation", "backward_pass", 50, 90),
    event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 60, 80, thread=2),
    event("cpu_op", "MmBackward0", 61, 75, thread=2),
    event("cuda_runtime", "cudaLaunchKernel", 70, 74, thread=2, correlation=4),
    event("python_function", "nn.Module: Elsewhere_0", 0, 100, thread=3),
    event("kernel", "gemm", 200, 230, thread=7, correlation=3),
    event("kernel", "gemm", 230, 237, thread=7, correlation=4),
    event("kernel", "of no known launch", 240, 250, thread=7, correlation=5),
    {"ph": "i", "name": "a moment", "ts": 3, "tid": 1},
]
FORWARD, BACKWARD = ("step", "forward_pass"), ("step", "backward_pass")
LAUNCH = "cudaLaunchKernel"


def test_host_time_nests_over_threads_adds_up_layers_and_leaves_nothing_out():
    assert stacks(EVENTS, "host") == {
        ("step",): 100 - 50 - 40,
        FORWARD: 50 - 15 - 20,
        (*FORWARD, "Layer"): (15 - 10) + (20 - 10),
        (*FORWARD, "Layer", "aten::mm"): (10 - 3) + 10,
        (*FORWARD, "Layer", "aten::mm", LAUNCH): 3,
        BACKWARD: 40 - 14,
        (*BACKWARD, "MmBackward0"): 14 - 4,
        (*BACKWARD, "MmBackward0", LAUNCH): 4,
    }


def test_gpu_time_is_that_of_the_kernels_where_they_were_launched():
    assert stacks(EVENTS, "device") == {
        (*FORWARD, "Layer", "aten::mm", LAUNCH, "gemm"): 30,
        (*BACKWARD, "MmBackward0", LAUNCH, "gemm"): 7,
    }


@pytest.mark.parametrize("late", [30, 60])
def test_of_two_that_overlap_the_later_one_is_cut_so_that_no_time_counts_twice(late: float):
    events = [event("user_annotation", "step 1", 0, 50), event("cpu_op", "op", 20, 50 + late)]
    assert stacks(events, "host") == {("step",): 20, ("step", "op"): 30}


def test_the_table_has_operators_or_kernels_by_their_own_time_and_the_share_of_it():
    head, mm, node, launch = operator_table(EVENTS, "host").splitlines()
    assert head.split() == ["own", "ms", "share", "calls", "operator,", "on", "the", "host"]
    assert mm.split() == ["0.017", "50.0%", "2", "aten::mm"]
    assert node.split() == ["0.010", "29.4%", "1", "MmBackward0"]
    assert launch.split() == ["0.007", "20.6%", "2", "cudaLaunchKernel"]
    head, gemm, other = operator_table(EVENTS, "device").splitlines()
    assert head.split()[-1] == "kernel"
    assert gemm.split() == ["0.037", "78.7%", "2", "gemm"]
    assert other.split()[2:] == ["1", "of", "no", "known", "launch"]
    assert len(operator_table(EVENTS, "host", rows=1).splitlines()) == 2


def test_a_disk_that_does_not_take_the_trace_is_one_line_with_the_remedy(tmp_path: Path):
    with tracing(torch.device("cpu")) as trace, span("step 1"):
        torch.ones(1)
    (tmp_path / "run").write_text("a file")
    with pytest.raises(
        RunError, match=r"run/profile: the trace could not be written: .*; make room, or set profile_tr"
    ):
        write_trace(trace, tmp_path / "run" / "profile")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_kernels_are_traced_under_their_spans_and_the_memory_is_told(tmp_path: Path):
    a = torch.randn(512, 512, device="cuda", requires_grad=True)
    with tracing(a.device) as trace, span("step 1"):
        with span("forward_pass"):
            product = (a @ a).sum()
        with span("backward_pass"):
            product.backward()
    write_trace(trace, tmp_path / "profile")
    written = {path.name: path for path in (tmp_path / "profile").iterdir()}
    assert set(written) == {
        *("trace.json.gz", "flame_graph.html", "flame_graph_gpu.html", "top_operators.txt", "memory.html")
    }
    page = written["flame_graph_gpu.html"].read_text()
    assert page.index('["step", ') < page.index('["backward_pass", ')
    assert '["forward_pass", ' in page
    assert "kernel" in written["top_operators.txt"].read_text()
    assert "MemoryViz" in written["memory.html"].read_text()
