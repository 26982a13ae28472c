"""Short runs with agents spread over processes, many in one fork: `mesh_worker.py FOLDER WHICH`.

test_mesh.py runs the same cases in one process and compares. The first process writes what the runs did.
"""

import math
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from accelerate.state import AcceleratorState
from isolation_worker import clone
from resume_matrix import Recorder
from toy import ALPHA, toy_agents, toy_samples

import train as script
from chorus.config import Config
from chorus.config.execution import Mode, Recompute
from chorus.data.batches import collate, training_steps
from chorus.mesh import make_mesh
from chorus.model.agents import AgentOutput
from chorus.training.engine import Engine, make_accelerator, start_engine
from chorus.training.state import TrainingState, read_state, restore_state

K, STEPS, MICRO_BATCHES, ROWS_OF_A_MICRO_BATCH = 4, 3, 2, 4
BROKEN, BROKEN_CALL = 1, 3  # the agent whose loss is not finite in the fourth micro-batch, of the second step


NumberOrTuple = float | tuple[float, ...]  # of all agents, or of each; a case is a key of a dict


class Case(NamedTuple):
    """What a run is; how it is spread is no part of it."""

    mode: Mode
    recompute: Recompute = "none"
    dropconnect_p: NumberOrTuple = 0.0
    dropout_p: NumberOrTuple = 0.0
    alpha: NumberOrTuple = ALPHA
    lr: NumberOrTuple = 0.01
    weight_decay: NumberOrTuple = 0.01
    packing: bool = False
    lambda_sw: float = 0.3
    max_grad_norm: float = 0.2
    is_broken: bool = False
    objective: tuple[tuple[str, Any], ...] = ()
    bootstrap: Literal["none", "poisson", "bayesian"] = "none"
    per_agent_batches: bool = False


PLAIN = Case("fused", bootstrap="bayesian")
BROKEN_CASE = Case("fused", is_broken=True)
PACKED = Case("sequential", "full", (0.4, 0.0, 0.2, 0.1), packing=True, bootstrap="poisson")
DROPPED = PACKED._replace(
    dropout_p=(0.2, 0.1, 0.0, 0.3)
)  # dropout draws anew for each data index: comparable where that is one
PARALLEL = Case("parallel", "selective", 0.4, lambda_sw=0.0, max_grad_norm=0.0, per_agent_batches=True)
UNLIKE = Case(
    "fused",
    alpha=(ALPHA, 2.5 * ALPHA, 2.0, 1.0),
    lr=(0.01, 0.005, 0.02, 0.001),
    weight_decay=(0.0, 0.5, 0.01, 2.0),
)  # of each agent its own
SHARED = Case(  # lambda of three steps: 0.15, 0.3, 0.15
    *("sequential", "full", 0.4),
    packing=True,
    objective=(
        *(("swd_space", "probabilities"), ("responsibility_alpha", 0.3)),
        *(("lambda_sw_warmup_ratio", 0.6), ("lambda_sw_decay_ratio", 0.4)),
    ),
)
# By number of processes: case, A, whether under ZeRO-2. "4" has every case on one mesh of four, "4, the rest"
# other meshes and engines.
RUNS = {
    "2": [(PLAIN, 2, False), (DROPPED, 2, True), (UNLIKE, 2, False), (SHARED, 2, False)],
    "4": [
        *((PLAIN, size, zero2) for size, zero2 in ((2, False), (4, True))),
        *((BROKEN_CASE, 2, zero2) for zero2 in (False, True)),
        (PARALLEL, 2, True),
        (PACKED, 2, False),
        (DROPPED, 4, True),
        (UNLIKE, 2, True),
        (SHARED, 2, False),
    ],
    "4, the rest": [
        *((PLAIN, size, zero2) for size, zero2 in ((1, False), (4, False), (2, True))),
        *((BROKEN_CASE, 2, zero2) for zero2 in (False, True)),
        (PARALLEL, 4, False),
        (UNLIKE, 1, False),
        *((SHARED, 2, zero2) for zero2 in (False, True)),
    ],
}
# A run, the step of its checkpoint, and with which A and engine it is resumed. After the second step of the
# broken run, AdamW has taken fewer steps for one agent.
RESUMES = {
    "2": [],
    "4": [
        ((PLAIN, 2, False), 1, 4, False),
        ((BROKEN_CASE, 2, True), 2, 1, True),
        ((UNLIKE, 2, True), 1, 4, True),
    ],
    "4, the rest": [
        ((PLAIN, 4, False), 2, 1, False),
        ((SHARED, 2, False), 1, 4, False),
        ((BROKEN_CASE, 2, False), 2, 4, True),
    ],
}


class Done(NamedTuple):
    """The rows of metrics.jsonl, the states after so many steps, and each agent's NLL of a fixed batch."""

    rows: dict[int, dict[str, Any]]
    states: dict[int, TrainingState]
    nll_KB: torch.Tensor


class _Kept:
    """In place of a checkpointer."""

    def __init__(self) -> None:
        self.states: dict[int, TrainingState] = {}

    def save(self, engine: Engine, step: int, *_: Any, **__: Any) -> None:
        self.states[step] = clone(read_state(engine))


def run(
    case: Case, size: int = 1, zero2: bool = False, saved: TrainingState | None = None, start: int = 0
) -> Done:
    """The case, with its agents over `size` of the processes that there are; or what is left of it."""
    AcceleratorState._reset_state()
    config = Config(
        num_agents=K,
        batch_size=ROWS_OF_A_MICRO_BATCH,
        gradient_accumulation_steps=MICRO_BATCHES,
        lambda_sw=case.lambda_sw,
        max_grad_norm=case.max_grad_norm,
        swd_points_per_row=3,
        packing=case.packing,
        bootstrap=case.bootstrap,
        per_agent_batches=case.per_agent_batches,
        max_seq_length=16,
        lr=listed(case.lr),
        weight_decay=listed(case.weight_decay),
        logging_steps=1,
        save_steps=1,
        mixed_precision="no",
        use_deepspeed=zero2,
        deepspeed_config_file=None,
        agent_parallel_size=size,
        **dict(case.objective),
    )
    accelerator = make_accelerator(config, config, K)
    mesh = make_mesh(accelerator, size)
    config = config.model_copy(update={"batch_size": ROWS_OF_A_MICRO_BATCH // mesh.data_size})
    agents = toy_agents(
        case.mode,
        num_agents=K,
        gradient_checkpointing=case.recompute,
        dropconnect_p=case.dropconnect_p,
        dropout_p=case.dropout_p,
        alpha=case.alpha,
        mesh=mesh,
    )
    engine = start_engine(accelerator, agents, config, mesh)
    kept, recorder = _Kept(), Recorder()
    if saved is not None:
        restore_state(engine, clone(saved))  # AdamW steps in the tensors that it is given
        kept.save(engine, start)
    elif case.is_broken and BROKEN in agents.agents and mesh.data_index == mesh.data_size - 1:
        break_once(engine)
    samples = toy_samples(20)
    where = {"process_index": mesh.data_index, "num_processes": mesh.data_size}
    where |= {"num_steps": STEPS, "start_step": start, "points_per_row": config.swd_points_per_row}
    steps = training_steps(samples, config, config, agents=agents.agents, pad_id=0, **where)
    checkpointer: Any = kept
    script.train(engine, steps, start, STEPS, config, checkpointer, recorder)
    with engine.unsharded(), torch.no_grad():
        fixed = collate(samples[:4], pad_id=0)
        nll_KB = torch.stack([agents.agent_pass(k, fixed)[0].sum(1) for k in agents.agents])
    assert agents.agents == mesh.held_agents(K)
    engine.unwrap()
    return Done(recorder.metrics, kept.states, nll_KB)


def listed(value: NumberOrTuple) -> float | list[float]:
    """As a configuration has it."""
    return list(value) if isinstance(value, tuple) else value


def break_once(engine: Engine) -> None:
    """Make the broken agent's loss NaN in one micro-batch, on this process."""
    place, calls = engine.agents.agents.index(BROKEN), iter(range(1000))

    def hook(_module: Any, _inputs: Any, output: AgentOutput) -> AgentOutput:
        factor_K = torch.ones(len(engine.agents.agents))
        if next(calls) == BROKEN_CALL:
            factor_K[place] = math.nan
        return output._replace(nll_KBT=output.nll_KBT * factor_K[:, None, None])

    engine.agents.register_forward_hook(hook)


def main(folder: Path, which: str) -> None:
    from deepspeed.utils import groups

    of_runs: dict[tuple, Done] = {}
    for zero2 in (False, True):  # DeepSpeed last: Accelerate keeps it on
        for one in RUNS[which]:
            if one[2] == zero2:
                groups.mpu = None  # DeepSpeed keeps the groups of a run for the next one in this process
                of_runs[one] = run(*one)
        for origin, start, size, resumed_zero2 in RESUMES[which]:
            if resumed_zero2 == zero2:
                groups.mpu = None
                saved = of_runs[origin].states[start]
                of_runs[(*origin, start, size, zero2)] = run(origin[0], size, zero2, saved, start)
    if torch.distributed.get_rank() == 0:
        torch.save({key: tuple(done) for key, done in of_runs.items()}, folder / "runs.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import mesh_worker  # what is pickled names the module of its class, and the reader has another __main__

    mesh_worker.main(Path(sys.argv[1]), sys.argv[2])
