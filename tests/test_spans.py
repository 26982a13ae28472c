"""What a span costs and means, on a clock that goes when the test says so."""

from collections.abc import Iterator

import pytest
import torch
from clock import Clock

from chorus import spans
from chorus.spans import Span, Stopwatch, listening, span

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(spans, "perf_counter", clock)
    return clock


@pytest.fixture
def stopwatch(clock: Clock) -> Iterator[Stopwatch]:
    stopwatch = Stopwatch(CPU)
    with listening(stopwatch):
        yield stopwatch


def named(step: Span) -> dict[str, tuple[float, float]]:
    """Whole and own time of each span in a step."""
    return {inner.name: (inner.seconds(), inner.own_seconds()) for inner in step.everything_inside()}


def test_while_nobody_listens_every_span_is_the_same_object_that_does_nothing():
    silent = span("forward_pass")
    assert span("backward_pass") is silent
    with silent as told, silent:
        assert told is None


def test_a_part_inside_of_another_is_taken_out_of_it_and_a_detail_is_not(clock: Clock, stopwatch: Stopwatch):
    with stopwatch("step") as step:
        clock.spend(1)
        with span("forward_pass"):
            clock.spend(2)
            with span("forward_pass.agent_0"):
                clock.spend(4)
                with span("task_loss"):
                    clock.spend(8)
            with span("task_loss"), span("communication"):
                clock.spend(16)
    assert [inner.name for inner in step.everything_inside()] == [
        *("forward_pass", "forward_pass.agent_0", "task_loss", "task_loss", "communication")
    ]
    assert named(step) == {
        "forward_pass": (30, 6),
        "forward_pass.agent_0": (12, 4),
        "task_loss": (16, 0),  # the second one, all of it communication
        "communication": (16, 16),
    }
    assert (step.seconds(), step.own_seconds()) == (31, 1)


def test_what_backward_makes_again_is_backwards_own(clock: Clock, stopwatch: Stopwatch):
    with stopwatch("step") as step:
        with span("backward_pass"):
            clock.spend(1)
            with span("forward_pass.agent_0"), span("task_loss"):
                clock.spend(2)
        with span("optimizer_step"):
            clock.spend(4)
    assert named(step) == {"backward_pass": (3, 3), "optimizer_step": (4, 4)}


def test_a_failure_ends_the_span_and_the_listening(clock: Clock):
    stopwatch = Stopwatch(CPU)
    step = Span("step", 0.0)

    def fail() -> None:
        nonlocal step
        with listening(stopwatch), stopwatch("step") as step, span("forward_pass"):
            clock.spend(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert named(step) == {"forward_pass": (1, 1)}
    assert span("forward_pass") is span("step")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpus_spans_last_as_long_as_the_gpu_is_in_them_without_the_host_waiting():
    stopwatch = Stopwatch(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    with stopwatch("step") as step:
        with stopwatch("much"):
            for _ in range(100):
                a @ a
        with stopwatch("little"):
            a @ a
        assert not step.inner[1].end.query()
    torch.cuda.synchronize()
    times = named(step)
    assert 10 * times["little"][0] < times["much"][0] <= step.seconds()
