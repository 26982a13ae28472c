"""Runs that are saved and resumed in every mode, split and engine, many of them in one process.

test_resume_matrix.py runs them alone; as one of two processes: `resume_matrix.py FOLDER ENGINE FROM,FROM`;
what ENGINE itself saves is resumed in the first call only.
"""

import os
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from isolation_worker import clone
from torch import Tensor

import train as script
from chorus.config import Config
from chorus.data.batches import Sample, collate, training_steps
from chorus.data.rows import read_rows
from chorus.mesh import make_mesh
from chorus.model.adapters import lora_shape
from chorus.model.agents import Mode, Regularisation, build_agents
from chorus.model.base import load_model, load_tokenizer
from chorus.monitoring.run_log import RunLog
from chorus.training.engine import Engine, make_accelerator, start_engine
from chorus.training.state import MOMENTS, TrainingState, read_state, restore_state

ROWS_OF_A_STEP, NUM_ROWS, NUM_STEPS = 6, 15, 6  # an epoch is three steps, the last of three rows
POSITIONS = {"mid-epoch": 2, "epoch end": 3, "last step": NUM_STEPS}
WAYS = list(product(get_args(Mode), (1, 3), (1,)))  # mode, accumulation, over how many processes agents are
SPREAD = list(product(get_args(Mode), (1,), (2,)))  # what two processes do besides


class Saved(NamedTuple):
    """A run, step by step.

    states, forwards: after so many steps; `forwards` are nll_KBT of a fixed batch, without training's noise.
    ids: the rows of each step, in order.
    metrics: the rows of metrics.jsonl.
    """

    states: dict[int, TrainingState]
    forwards: dict[int, Tensor]
    ids: dict[int, list[int]]
    metrics: dict[int, dict[str, Any]]


class Recorder(RunLog):
    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, dict[str, Any]] = {}

    def advance(self, metrics: Any) -> None:
        self.metrics[metrics["step"]] = metrics


class StatesKept:
    """A checkpointer that keeps states in memory."""

    def __init__(self, fixed: Any) -> None:
        self.fixed = fixed
        self.states: dict[int, TrainingState] = {}
        self.forwards: dict[int, Tensor] = {}

    def save(self, engine: Engine, step: int, epoch: int, skips_in_a_row: int, scores: Any = None) -> None:
        self.states[step] = clone(read_state(engine))
        self.forwards[step] = forward(engine, self.fixed)


def forward(engine: Engine, batch: Any) -> Tensor:
    with torch.no_grad(), engine.unsharded():
        return torch.stack([engine.agents.agent_pass(k, batch)[0] for k in engine.agents.agents])


def engine_of(mode: Mode, accumulation: int, size: int) -> tuple[Engine, Config]:
    """An engine at the start of the run, and the configuration of the run."""
    AcceleratorState._reset_state()
    config = Config(
        parallel_mode=mode,
        gradient_accumulation_steps=accumulation,
        agent_parallel_size=size,
        num_agents=2,
        lambda_sw=0.0,
        dropconnect_p=0.1,
        logging_steps=1,
        save_steps=1,
        batch_size=1,
    )
    accelerator = make_accelerator(config, config, config.num_agents)
    mesh = make_mesh(accelerator, size)
    config = config.model_copy(
        update={
            "batch_size": ROWS_OF_A_STEP // (accumulation * mesh.data_size),
            "mixed_precision": "no",
        }
    )
    model = load_model(config.model_name, torch.float32, accelerator.device)
    rates = Regularisation(config.dropconnect_p, 0.0, config.seed)
    agents = build_agents(mode, model, 2, lora_shape(config), rates, mesh=mesh)
    return start_engine(accelerator, agents, config, mesh), config


def run(
    mode: Mode,
    accumulation: int,
    size: int,
    samples: Sequence[Sample],
    saved: Saved | None = None,
    start: int = 0,
) -> Saved:
    """The run, or what is left of it after `start` steps of a saved one."""
    engine, config = engine_of(mode, accumulation, size)
    mesh = engine.mesh
    checkpointer, recorder = StatesKept(collate(samples[:4], pad_id=0)), Recorder()
    if saved is not None:
        restore_state(engine, clone(saved.states[start]))  # AdamW steps in the tensors that it is given
        checkpointer.save(engine, start, epoch=0, skips_in_a_row=0)
    place = {tuple(sample.ids[:-1].tolist()): number for number, sample in enumerate(samples)}
    ids: dict[int, list[int]] = {}
    steps = training_steps(
        samples,
        config,
        config,
        agents=engine.agents.agents,
        points_per_row=config.swd_points_per_row,
        pad_id=0,
        process_index=mesh.data_index,
        num_processes=mesh.data_size,
        num_steps=NUM_STEPS,
        start_step=start,
    )

    def watched() -> Any:
        for step, batch in enumerate(steps, start):
            own = [rows_of(part, place) for part in batch.micro_batches]
            ids[step] = in_order(gather_object([own])[: mesh.data_size])  # of one data group
            yield batch

    checkpointer_like: Any = checkpointer
    script.train(engine, watched(), start, NUM_STEPS, config, checkpointer_like, recorder)
    return Saved(checkpointer.states, checkpointer.forwards, ids, recorder.metrics)


def rows_of(batch: Any, place: dict[tuple, int]) -> list[int]:
    rows = [
        tuple(row[: len(row) - int((row.flip(0) != 0).int().argmax())].tolist()) for row in batch.input_BT
    ]
    return [place[row] for row in rows if any(row)]  # a process without rows has one of padding


def in_order(of_processes: list[list[list[int]]]) -> list[int]:
    """Of a step: micro-batch by micro-batch, the processes side by side."""
    return [row for parts in zip(*of_processes, strict=True) for part in parts for row in part]


def assert_goes_on(saved: Saved, start: int, resumed: Saved, is_bitwise: bool) -> None:
    """Bitwise the same state, the same rows in the same order, the
    same first forward; then losses within rounding."""
    assert difference(saved.states[start], resumed.states[start]) == 0
    assert saved.states[start].optimizer_step == resumed.states[start].optimizer_step == start
    assert resumed.ids == {step: rows for step, rows in saved.ids.items() if step >= start}
    if is_bitwise:
        assert torch.equal(saved.forwards[start], resumed.forwards[start])
    assert torch.allclose(saved.forwards[start], resumed.forwards[start], rtol=0, atol=2e-5)
    assert list(resumed.metrics) == list(range(start + 1, NUM_STEPS + 1))
    for step, metrics in resumed.metrics.items():
        assert metrics["lr"] == saved.metrics[step]["lr"]
        expected = saved.metrics[step]["task_loss_per_agent"]
        assert metrics["task_loss_per_agent"] == (
            expected if is_bitwise else pytest.approx(expected, rel=2e-5)
        )
    last = difference(saved.states[NUM_STEPS], resumed.states[NUM_STEPS])
    assert last == 0 if is_bitwise else last < 2e-4


def difference(one: TrainingState, other: TrainingState) -> float:
    pairs = [(one.weights, other.weights), *((one.moments[name], other.moments[name]) for name in MOMENTS)]
    assert all(ours.keys() == theirs.keys() for ours, theirs in pairs)
    return max(float((ours[key] - theirs[key]).abs().max()) for ours, theirs in pairs for key in ours)


def rows_to_train_on() -> list[Sample]:
    config = Config(debug_subset_size=NUM_ROWS)
    samples = list(read_rows(config, config.seed, load_tokenizer(config.model_name)).train)
    assert len({tuple(sample.ids.tolist()) for sample in samples}) == NUM_ROWS
    return samples


def save_all(samples: Sequence[Sample], ways: Sequence[tuple] = WAYS) -> dict[tuple, Saved]:
    return {way: run(*way, samples) for way in ways}


def main(folder: Path, engine: str, others: str) -> None:
    from deepspeed.utils import groups

    samples, ways = rows_to_train_on(), [*WAYS, *SPREAD]
    runs, own = {}, folder / f"{engine}.pt"
    if not own.exists():  # both processes see none: the first one writes it after a run of both
        runs[engine] = save_all(samples, sorted(ways, key=lambda way: way[2]))
        if int(os.environ["RANK"]) == 0:
            torch.save(runs[engine], own)
    for other in filter(None, others.split(",")):
        runs[other] = torch.load(folder / f"{other}.pt", weights_only=False)
    for origin, way, position in product(runs, ways, POSITIONS.values()):
        for saved_way, saved in runs[origin].items():
            groups.mpu = None  # DeepSpeed keeps the groups of a run for the next one in this process
            resumed = run(*way, samples, saved, position)
            assert_goes_on(saved, position, resumed, (origin, saved_way) == (engine, way))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import resume_matrix  # what is pickled names the module of its class, and the reader has another __main__

    resume_matrix.main(Path(sys.argv[1]), *sys.argv[2:])
