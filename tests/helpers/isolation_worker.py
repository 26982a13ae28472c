"""Steps of an engine in which one agent's forward, loss or gradient is not finite, on one process.

Run by test_nonfinite.py and test_partitions.py under the launchers, as one of two processes; writes the
states of every run into a folder. A DeepSpeed JSON may follow.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed import distributed_c10d
from toy import toy_agents, toy_samples

from chorus.config import Config
from chorus.data.batches import Batch, StepBatch, collate
from chorus.errors import InputError
from chorus.mesh import Mesh
from chorus.model.agents import AgentOutput, Agents
from chorus.training.diversity import SwdSettings
from chorus.training.engine import Engine, make_accelerator, start_engine
from chorus.training.nonfinite import SkippedUpdates
from chorus.training.objective import objective
from chorus.training.signals import StopRequest
from chorus.training.state import TrainingState, read_state
from chorus.training.step import StepDone

BROKEN = 1  # the agent
STEPS, BROKEN_STEP = 3, 1  # of 0, 1, 2
CONFIG = Config(
    num_agents=3, lambda_sw=0.0, max_grad_norm=0.0, lr=0.01, batch_size=2, collective_timeout_s=777
)
CASES = (
    ("no", "fused", ("forward", "loss", "gradient", "x 1000")),
    ("no", "sequential", ("forward",)),
    ("no", "parallel", ("gradient",)),
    ("bf16", "fused", ("loss",)),
)


def fault(kind: str, engine: Engine) -> None:
    """From now on the agent's part of a forward pass of this process is broken in this way."""
    adapter_F = engine.agents.adapters()[BROKEN]

    def with_one_infinite(gradient_F: Tensor) -> Tensor:
        where = torch.arange(len(gradient_F), device=gradient_F.device) == len(gradient_F) // 2
        return gradient_F.masked_fill(where, math.inf)

    def output_of(output: AgentOutput) -> AgentOutput:
        nll_BT, hidden_BTD = (of_all[BROKEN] for of_all in output)
        if kind == "forward":
            nll_BT, hidden_BTD = math.nan * nll_BT, math.nan * hidden_BTD
        elif kind == "loss":  # infinite, with a gradient that is finite
            nll_BT = nll_BT + math.inf
        elif kind == "x 1000":
            nll_BT = 1000 * nll_BT
        parts = zip(output, (nll_BT, hidden_BTD), strict=True)
        return AgentOutput(
            *(torch.stack([*of_all[:BROKEN], own, *of_all[BROKEN + 1 :]]) for of_all, own in parts)
        )

    hooks: list[Any] = [
        engine.agents.register_forward_hook(lambda _module, _inputs, output: output_of(output))
    ]
    if kind == "gradient":
        hooks.append(adapter_F.register_hook(with_one_infinite))
    engine.agents.hooks_of_a_fault = hooks  # pyright: ignore


def mend(engine: Engine) -> None:
    for hook in getattr(engine.agents, "hooks_of_a_fault", ()):
        hook.remove()


def rows_of_step(step: int, share: slice = slice(None)) -> Batch:
    return collate(toy_samples(4, seed=step)[share], pad_id=0, points_per_row=3)


def take_step(engine: Engine, config: Config, step: int) -> StepDone:
    whole, own = rows_of_step(step), 4 // engine.mesh.data_size
    batch = rows_of_step(step, slice(engine.mesh.data_index * own, (engine.mesh.data_index + 1) * own))
    with engine.micro_batch(is_last=True):
        part = objective(
            *engine.module(batch, step=step),
            batch,
            num_targets=len(whole.target_rows_N),
            num_micro_batches=1,
            lambda_sw=config.lambda_sw,
            swd=SwdSettings(5, "tokens", 0),
            step=step,
            rows_per_process=own,
            gather=engine.mesh.gather_rows,
        )
        engine.backward(part.share)
    step_batch = StepBatch([batch], len(whole.target_rows_N), 4, 0)
    return StepDone(step + 1, 1000, step_batch, [], engine.step(config.lr))


def run(
    engine: Engine, config: Config, kind: str | None = None
) -> tuple[list[TrainingState], dict[str, Any]]:
    """The state after each step, with the fault in one of them
    on the last process; and what is kept of it."""
    states, grad_norm = [], math.nan
    skips = SkippedUpdates(config.max_skipped_steps, 0, config.output_dir)
    for step in range(STEPS):
        if kind is not None and step == BROKEN_STEP and engine.mesh.data_index == engine.mesh.data_size - 1:
            fault(kind, engine)
        done = take_step(engine, config, step)
        mend(engine)
        skips.after_step(done)
        skips.settle(done)
        states.append(clone(read_state(engine)))
        grad_norm = float(done.result.grad_norm)
    facts = {"skips_in_a_row": skips.in_a_row, "skipped": skips.take_count(), "grad_norm": grad_norm}
    return states, facts


def clone(state: TrainingState) -> TrainingState:
    def of(tensors: dict[Any, Tensor]) -> dict[Any, Tensor]:
        return {identity: tensor.clone() for identity, tensor in tensors.items()}

    return TrainingState(
        of(state.weights), {name: of(own) for name, own in state.moments.items()}, state.optimizer_step
    )


def main(folder: Path, json_file: str | None = None) -> None:
    accelerator = engine = None
    for precision, mode, kinds in CASES if json_file is None else CASES[:1]:
        config = CONFIG.model_copy(
            update={
                "mixed_precision": precision,
                **({"deepspeed_config_file": json_file, "use_deepspeed": True} if json_file else {}),
            }
        )
        for kind in (None, *kinds):
            AcceleratorState._reset_state()
            accelerator = make_accelerator(config, config)
            dtype = torch.float32 if precision == "no" else torch.bfloat16
            engine = start_engine(accelerator, toy_agents(mode, dtype=dtype), config)
            assert accelerator.num_processes == 2
            results = run(engine, config, kind)
            if accelerator.is_main_process:
                torch.save(results, folder / f"{precision}-{mode}-{kind}.pt")
    assert accelerator is not None
    assert engine is not None
    process = accelerator.process_index
    write_timeouts(folder / f"timeouts_{process}.json", accelerator)
    for unlike in ("order", "adapter", "base"):
        with pytest.raises(InputError) as caught:
            start_engine(accelerator, agents_unlike(unlike if process == 1 else None), CONFIG)
        (folder / f"{unlike}_{process}").write_text(str(caught.value))
    accelerator.wait_for_everyone()
    engine.close()


def write_timeouts(file: Path, accelerator: Accelerator) -> None:
    """Those of all process groups that exist, in seconds, by the group's name."""
    get_backend, torch.distributed.get_backend = torch.distributed.get_backend, lambda: "nccl"
    StopRequest(
        accelerator, CONFIG.collective_timeout_s
    )  # makes the group of its own that it has beside NCCL
    torch.distributed.get_backend = get_backend
    groups = distributed_c10d._world.pg_map
    backends = {group.group_name: group._get_backend(torch.device("cpu")) for group in groups}
    file.write_text(
        json.dumps({name: own.options._timeout.total_seconds() for name, own in backends.items()})
    )


def agents_unlike(what: str | None) -> Agents:
    """Agents of another order, or with one other value, in an adapter or in the base."""
    held = Mesh.held_agents
    if what == "order":
        Mesh.held_agents = lambda *_: (0, 2, 1)
    agents = toy_agents("fused")
    Mesh.held_agents = held
    names = {"adapter": "agent_2", "base": "model.model.norm.weight"}
    for name, parameter in agents.named_parameters():
        if what in names and name.endswith(names[what]):
            parameter.data.view(-1)[-1] += 1
    return agents


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
