"""Which rows make which step: on every process, in every epoch, after a resume, with workers of their own."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from launching import HELPERS, PATIENCE_S, wait_for
from samples import PAD, make_samples, training_steps

from chorus.data.batches import Batch, Sample, StepBatch
from chorus.data.bootstrap import bootstrap_weights
from chorus.data.order import epoch_order, step_rows, steps_per_epoch


def test_an_order_is_a_permutation_of_seed_and_epoch() -> None:
    def order_of(seed: int, epoch: int, shuffle: bool) -> list[int]:
        return epoch_order(50, seed, epoch, shuffle).tolist()

    orders = {(seed, epoch): order_of(seed, epoch, True) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert order_of(2, 1, True) == orders[2, 1]
    assert order_of(2, 1, False) == list(range(50))


GEOMETRIES = list(itertools.product([1, 2, 5, 16, 23], [1, 2, 3], [1, 2, 4], [1, 2, 3]))


@pytest.mark.parametrize(("num_samples", "batch_size", "accumulation", "num_processes"), GEOMETRIES)
def test_the_steps_of_an_epoch_take_its_order_once(
    num_samples: int, batch_size: int, accumulation: int, num_processes: int
) -> None:
    order = epoch_order(num_samples, 0, 0, True)
    split = (batch_size, accumulation, num_processes)
    steps = [step_rows(order, step, *split) for step in range(steps_per_epoch(num_samples, *split))]
    flat = [row for step in steps for micro_batch in step for part in micro_batch for row in part]
    assert flat == order.tolist()
    for step in steps:
        assert [len(micro_batch) for micro_batch in step] == [num_processes] * accumulation
    for step in steps[:-1]:
        assert all(len(part) == batch_size for micro_batch in step for part in micro_batch)
    assert any(steps[-1][0])


def rows_of(batch: Batch) -> list[int]:
    return [first - 100 for first in batch.input_BT[:, 0].tolist() if first != PAD]


def of_all_processes(
    samples: list[Sample], batch_size: int, accumulation: int, processes: int, num_steps: int
) -> list[tuple[StepBatch, ...]]:
    """steps[step][process]"""
    keys = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "num_steps": num_steps}
    streams = [training_steps(samples, process=p, processes=processes, **keys) for p in range(processes)]
    return list(zip(*streams, strict=True))


@pytest.mark.parametrize("num_samples", [1, 7, 16, 23])
@pytest.mark.parametrize(("accumulation", "processes"), [(4, 1), (1, 4), (2, 2)])
def test_every_way_to_split_a_global_batch_takes_the_same_rows_in_each_step(
    num_samples: int, accumulation: int, processes: int
) -> None:
    samples = make_samples(num_samples)
    own = of_all_processes(samples, 2, accumulation, processes, num_steps=7)
    reference = of_all_processes(samples, 8, 1, 1, num_steps=7)
    for parts, [whole] in zip(own, reference, strict=True):
        in_order = [part.micro_batches[m] for m in range(accumulation) for part in parts]
        assert [row for batch in in_order for row in rows_of(batch)] == rows_of(whole.micro_batches[0])
        for part in parts:
            assert len(part.micro_batches) == accumulation
            assert (part.num_targets, part.num_rows, part.epoch) == (
                whole.num_targets,
                whole.num_rows,
                whole.epoch,
            )
        assert sum(int(batch.mask_BT.sum()) for batch in in_order) == whole.num_targets
        assert sum(len(rows_of(batch)) for batch in in_order) == whole.num_rows


@pytest.mark.parametrize("shuffle", [False, True])
def test_epochs_follow_one_another_until_the_last_step(shuffle: bool) -> None:
    samples = make_samples(10)
    steps = list(training_steps(samples, num_steps=7, batch_size=4, shuffle=shuffle, seed=5))
    assert [step.epoch for step in steps] == [0, 0, 0, 1, 1, 1, 2]
    assert [step.num_rows for step in steps] == [4, 4, 2, 4, 4, 2, 4]
    rows = [row for step in steps for batch in step.micro_batches for row in rows_of(batch)]
    assert rows == [row for epoch in range(3) for row in epoch_order(10, 5, epoch, shuffle).tolist()][:24]


def as_lists(steps: Iterator[StepBatch]) -> list:
    """Comparable with ==."""
    return [
        ([[t if t is None else t.tolist() for t in batch] for batch in step.micro_batches], *step[1:])
        for step in steps
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_the_tail_of_the_uninterrupted_one(num_workers: int) -> None:
    samples = make_samples(11)
    keys = {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "pad_to_multiple_of": 4,
        "process": 1,
        "processes": 2,
    }
    whole = as_lists(training_steps(samples, num_steps=6, **keys))
    assert len(whole) == 6
    for start in range(7):
        tail = training_steps(samples, num_steps=6, start_step=start, num_workers=num_workers, **keys)
        assert as_lists(tail) == whole[start:]


# ---- rows and weights of each agent's own ----


def weights_of(step: StepBatch, agents: list[int]) -> dict[tuple[int, int], float]:
    """The weight of each row of a step, by (agent, row); of packed rows, too, each of which has one token."""
    found = {}
    for batch in step.micro_batches:
        sets, weight_KS = batch.num_sets, batch.weight_KS
        assert weight_KS is not None
        ids_KN = batch.input_BT.view(sets, -1).expand(len(agents), -1)
        in_a_row = torch.arange(weight_KS.shape[1]).repeat_interleave(ids_KN.shape[1] // weight_KS.shape[1])
        sample_KN = in_a_row[None].expand(len(agents), -1)
        if batch.sample_BT is not None:
            sample_KN = batch.sample_BT.view(sets, -1).expand(len(agents), -1)
        for place, agent in enumerate(agents):
            for token, sample in zip(ids_KN[place].tolist(), sample_KN[place].tolist(), strict=True):
                if token != PAD:
                    weight = float(weight_KS[place, sample])
                    assert found.setdefault((agent, token - 100), weight) == weight
    return found


WAYS = [
    {},
    {"packing": True, "max_seq_length": 24},
    {"start_step": 3},
    {"num_workers": 1},
    {"batch_size": 2, "gradient_accumulation_steps": 2},
    {"batch_size": 2, "processes": 2},
    {"shuffle": False},
    {"swd_points_per_row": 1, "agents": [2]},
]


@pytest.mark.parametrize("bootstrap", ["poisson", "bayesian"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_row_has_an_agents_weight_in_every_epoch_and_split_and_after_a_resume(way: dict, bootstrap: str):
    samples, agents = make_samples(11), way.get("agents", [0, 2, 3])
    num_targets_N = torch.tensor([sample.num_targets for sample in samples])
    expected_KN = bootstrap_weights(bootstrap, 5, agents, num_targets_N)  # pyright: ignore[reportArgumentType]
    keys = {"batch_size": 4, "bootstrap": bootstrap, "seed": 5, "agents": agents, **way}
    seen = []
    for process in range(keys.get("processes", 1)):
        for step in training_steps(samples, num_steps=6, process=process, **keys):
            for (agent, row), weight in weights_of(step, agents).items():
                assert weight == float(expected_KN[agents.index(agent), row])
                seen.append((agent, row))
    epochs = 2 if keys.get("start_step", 0) == 0 else 1
    assert sorted(seen) == sorted(
        (agent, row) for agent in agents for row in range(11) for _ in range(epochs)
    )


@pytest.mark.parametrize("way", [way for way in WAYS if "shuffle" not in way], ids=str)
def test_agents_with_batches_of_their_own_take_each_row_once_an_epoch_in_their_own_order(way: dict):
    """Their losses are token means over their own targets of the step, whatever part a process computes."""
    samples, agents = make_samples(11), way.get("agents", [0, 2, 3])
    keys = {"batch_size": 4, "per_agent_batches": True, "lambda_sw": 0, "seed": 5, "agents": agents, **way}
    start, processes = keys.get("start_step", 0), keys.get("processes", 1)
    streams = [training_steps(samples, num_steps=6, process=p, **keys) for p in range(processes)]
    for number, parts in enumerate(zip(*streams, strict=True), start):
        epoch, place = divmod(number, 3)
        assert {part.epoch for part in parts} == {epoch}
        found = {key: weight for part in parts for key, weight in weights_of(part, agents).items()}
        for agent in agents:
            rows = epoch_order(11, 5, epoch, True, agent)[4 * place : 4 * place + 4].tolist()
            assert sorted(row for one, row in found if one == agent) == sorted(rows)
            own_targets = sum(samples[row].num_targets for row in rows)
            for row in rows:
                weight = found[agent, row] / parts[0].num_targets
                assert weight == pytest.approx(1 / own_targets, rel=1e-6)
        for part in parts:
            assert (part.num_targets, part.num_rows) == (parts[0].num_targets, min(4, 11 - 4 * place))
    orders = {
        tuple(epoch_order(11, 5, epoch, True, agent).tolist()) for epoch in (0, 1) for agent in (0, 1, None)
    }
    assert len(orders) == 6


def test_a_resumed_run_reads_no_earlier_row() -> None:
    class Watched(list):
        read: list[int]

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

    samples = Watched(make_samples(10))
    samples.read = []
    [step] = training_steps(samples, num_steps=6, start_step=5, batch_size=2)
    assert samples.read == rows_of(step.micro_batches[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_neither_read_nor_moved(num_workers: int) -> None:
    samples = make_samples(9)

    def steps(seed: int) -> list:
        torch.manual_seed(seed)
        random.seed(seed)
        before = torch.get_rng_state(), random.getstate()
        taken = as_lists(training_steps(samples, num_steps=4, batch_size=3, num_workers=num_workers))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        return taken

    assert steps(0) == steps(1)


def test_workers_end_with_an_iterator_that_is_left_early() -> None:
    steps = training_steps(make_samples(9), num_steps=1_000, batch_size=3, num_workers=2)
    assert len(list(islice(steps, 3))) == 3
    assert len(multiprocessing.active_children()) == 2
    del steps
    wait_for(lambda: not multiprocessing.active_children())


TRAINER = """
import os, signal, sys
from torch import multiprocessing
from samples import make_samples, training_steps

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)  # as a trainer that ends its step first
steps = training_steps(make_samples(9), num_steps=400, batch_size=3, num_workers=2)
for number in sys.argv[1:]:
    os.killpg(0, int(number))  # the workers have just been forked
next(steps)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
sys.stdin.readline()
print(1 + sum(1 for _ in steps), flush=True)
sys.stdin.readline()
"""


def start_trainer(*arguments: str) -> tuple[subprocess.Popen, list[int]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, *arguments], cwd=HELPERS, start_new_session=True, **pipes
    )
    assert trainer.stdout is not None
    return trainer, [int(pid) for pid in trainer.stdout.readline().split()]


@pytest.mark.launch
def test_workers_outlive_signals_to_the_process_group() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    trainer, workers = start_trainer(*(str(int(number)) for number in numbers))
    assert len(workers) == 2
    for number in numbers:
        os.killpg(trainer.pid, number)
    output, _ = trainer.communicate("go\ngo\n", timeout=PATIENCE_S)
    assert (trainer.returncode, output) == (0, "400\n")


@pytest.mark.launch
def test_workers_end_when_their_trainer_is_killed() -> None:
    trainer, workers = start_trainer()
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.communicate()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}/cmdline") for pid in workers))
