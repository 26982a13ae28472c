"""A few real optimiser steps in one mode, and the results that `dry_run` checks."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from chorus.checkpoint.store import Checkpointer, checkpoints, read_tensors, verify
from chorus.config import RunConfig
from chorus.data.batches import Batch, Sample, collate, training_steps
from chorus.ensemble.mixture import dirichlet_weights, mixture_log_prob, uniform_weights
from chorus.mesh import ALONE, Mesh
from chorus.model.adapters import TensorId, adapter_name, lora_shape
from chorus.model.agents import Agents, build_agents, causal_lm
from chorus.model.base import base_tensors, copy_sharing_storage
from chorus.model.execution import Execution, decide_execution
from chorus.model.regularisation import Regularisation
from chorus.monitoring.memory import peak_bytes, reset_peak
from chorus.monitoring.run_log import RunLog
from chorus.planning.forecast import GIB
from chorus.planning.live_bytes import bytes_of
from chorus.training.engine import Engine, start_engine, zero_stage

STEPS = 2
PEFT_TOKENS = 32  # of the row for the comparison with stock PEFT, which computes all its logits

Loop = Callable[..., None]  # train.py's own loop


class Setting(NamedTuple):
    """All that a trial run needs.

    Attributes:
        base: on its device, frozen; no mode changes it. None: each mode loads its own, because ZeRO-3 shards
        it.
        pad_id: any id of the vocabulary.
        mesh: of all processes.
    """

    config: RunConfig
    accelerator: Accelerator
    base: PreTrainedModel | None
    load_base: Callable[[], PreTrainedModel]
    samples: Sequence[Sample]
    pad_id: int
    loop: Loop
    folder: Path
    mesh: Mesh = ALONE


@dataclass
class ModeRun:
    """What a mode did.

    Attributes:
        losses: each step's loss of each agent, nats a token.
        step_s: seconds of the last step, its waiting for the device included.
        peak: the most bytes that this process held on its GPU, see `memory.peak_bytes`; None on a CPU.
        engine: the engine's own description.
        unmoved: for each agent, the number of B matrices that did not change.
        changed: base tensors with a changed bit.
        not_shared: base tensors that some agent has a copy of.
        growth: bytes that one more agent takes, beyond its adapters.
        holders: of each process, the agents that it holds, with a checksum of each adapter after the steps.
    """

    mode: str
    losses: list[list[float]]
    step_s: float
    peak: int | None
    engine: str
    unmoved: dict[int, int]
    changed: list[str]
    not_shared: list[str]
    growth: int
    holders: list[dict[int, int]]
    reload: "Reload | None" = None

    def report(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "mode": self.mode,
            "step_ms": round(1000 * self.step_s, 3),
            "peak_gib": None if self.peak is None else round(self.peak / GIB, 3),
            "losses": self.losses,
            "engine": self.engine,
        }


class Reload(NamedTuple):
    """A checkpoint read back, and the mixture's probabilities.

    Attributes:
        unchanged: agents whose loss is bitwise the same as before the steps.
        differs: largest difference of a hidden state between the agents and those read from their checkpoint.
        peft_differs: largest difference of a logit between an agent and stock PEFT's reading of its folder,
            relative to the largest logit.
        probability: what the mixture's probabilities of the next token sum to.
        weights: what its weights sum to.
    """

    unchanged: list[int]
    differs: float
    peft_differs: float
    probability: float
    weights: float


class _Recorder(RunLog):
    """Keeps the logged rows, and the time at which each step was done."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Mapping[str, Any]] = []
        self.done: list[float] = []

    def advance(self, metrics: Mapping[str, Any] | None) -> None:
        assert metrics is not None, "every step is logged"
        self.rows.append(metrics)
        self.done.append(time.perf_counter())


class _NoCheckpointer(Checkpointer):
    def save(
        self,
        engine: Engine,
        step: int,
        epoch: int,
        skips_in_a_row: int,
        scores: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves only the run's own mode."""


def trial_config(config: RunConfig, mode: str, folder: Path) -> RunConfig:
    """The configuration of `STEPS` optimiser steps in `mode`, each of them logged."""
    steps = {"max_train_steps": STEPS, "logging_steps": 1, "save_steps": 0, "max_skipped_steps": 0}
    # With warm-up the first step has a learning rate of 0, after which all agents would still equal the base.
    schedule = {"num_warmup_steps_ratio": 0.0, "shuffle": False, "num_workers": 0}
    unprofiled = {"profile_steps": 0, "profile_trace": False}
    place = {"parallel_mode": mode, "output_dir": str(folder)}
    return config.model_copy(update={**steps, **schedule, **unprofiled, **place})


def rehearse(setting: Setting, mode: str, is_own: bool) -> ModeRun:
    """Take `STEPS` optimiser steps in `mode` by train.py's own loop. A collective call.

    Args:
        is_own: this is the mode of the run: its checkpoint is written and read back.

    Raises:
        InputError, RunError: as in the run itself.
    """
    config = trial_config(setting.config, mode, setting.folder)
    accelerator, device = setting.accelerator, setting.accelerator.device
    base = setting.base or setting.load_base()
    reset_peak(device)
    execution = decide_execution(config, device, base_in_shards=zero_stage(accelerator) == 3)
    agents = agents_of(config, base, config.num_agents, execution, setting.mesh)
    not_shared, more = not_shared_tensors(agents), growth(config, base, agents)
    engine = start_engine(accelerator, agents, config, setting.mesh)
    weights = {identity: tensor.clone() for identity, tensor in engine.adapter_values().items()}
    batch = collate(setting.samples[: config.batch_size], setting.pad_id).to(device)
    with engine.unsharded():
        checksums = checksums_of(agents)
        nll_before_K = answers(agents, batch)[0] if is_own else None
    recorder = _Recorder()
    steps = training_steps(
        setting.samples,
        config,
        config,
        agents=agents.agents,
        points_per_row=config.swd_points_per_row,
        pad_id=setting.pad_id,
        process_index=engine.mesh.data_index,
        num_processes=engine.mesh.data_size,
        num_steps=STEPS,
    )
    checkpointer = (Checkpointer if is_own else _NoCheckpointer)(
        setting.folder, config, {"config": config.model_dump()}
    )
    setting.loop(engine, steps, 0, STEPS, config, checkpointer, recorder)
    run = ModeRun(
        mode=mode,
        losses=[row["task_loss_per_agent"] for row in recorder.rows],
        step_s=recorder.done[-1] - recorder.done[-2],
        peak=peak_bytes(device) if device.type == "cuda" else None,
        engine=engine.description,
        unmoved=unmoved(weights, engine.adapter_values()),
        changed=[],
        not_shared=not_shared,
        growth=more,
        holders=gather_object([{agent: bits_of(own) for agent, own in agents.adapters().items()}]),
    )
    accelerator.wait_for_everyone()  # the first process has written the checkpoint
    with engine.unsharded():
        run.changed = [name for name, value in checksums_of(agents).items() if value != checksums[name]]
        if nll_before_K is not None:
            run.reload = reload(setting.folder, base, config, agents, batch, nll_before_K)
    engine.unwrap()
    del engine, agents, steps, base
    gc.collect()
    return run


def agents_of(
    config: RunConfig, base: PreTrainedModel, num_agents: int, execution: Execution, mesh: Mesh = ALONE
) -> Agents:
    """New agents on the base's storage; the base itself is not modified."""
    rates = Regularisation(config.dropconnect_p, config.lora_dropout, config.seed)
    own = copy_sharing_storage(base)
    shape = lora_shape(config)
    return build_agents(config.parallel_mode, own, num_agents, shape, rates, execution, mesh=mesh)


def not_shared_tensors(agents: Agents) -> list[str]:
    """Base tensors that are not in the first agent's storage, such as `agent 2: model.layers.0...`."""
    first = agents.frozen_tensors()
    return [
        f"agent {agent}: {name}"
        for agent in agents.agents[1:]
        for name, tensor in base_tensors(causal_lm(agents.peft_model(agent)))
        if tensor.data_ptr() != first[name].data_ptr()
    ]


def growth(config: RunConfig, base: PreTrainedModel, agents: Agents) -> int:
    """Bytes that one more agent takes, beyond its adapters: 0 where the base is shared."""
    counted = []
    # An extra agent has no entry in keys with a value for each agent, and needs none.
    plain = config.model_copy(update=dict.fromkeys(("lora_alpha", "lora_init_gain"), 1.0))
    for num_agents in (len(agents.agents), len(agents.agents) + 1):
        built = agents_of(plain, base, num_agents, Execution())
        counted.append(bytes_of([*built.parameters(), *built.buffers()]))
    return counted[1] - counted[0] - 4 * agents.adapters()[agents.agents[0]].numel()


def checksums_of(agents: Agents) -> dict[str, int]:
    """A checksum of every base tensor: the sum of its bits as integers. Any changed value changes it."""
    return {name: bits_of(tensor) for name, tensor in agents.frozen_tensors().items()}


def bits_of(tensor: Tensor) -> int:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return int(tensor.detach().contiguous().view(whole).sum(dtype=torch.int64)) if tensor.numel() else 0


def unmoved(before: Mapping[TensorId, Tensor], after: Mapping[TensorId, Tensor]) -> dict[int, int]:
    """For each agent, how many of its B did not change. (A has no gradient while B is zero, as at the
    start.)
    """
    counts = dict.fromkeys(sorted({identity.agent for identity in before}), 0)
    for identity, tensor in before.items():
        counts[identity.agent] += identity.matrix == "B" and torch.equal(tensor, after[identity])
    return counts


@torch.no_grad()
def answers(agents: Agents, batch: Batch) -> tuple[Tensor, Tensor]:
    """nll_K, summed over the batch, and hidden_KBTD of every agent without training's noise; on the CPU."""
    with evaluating(agents):
        passes = [agents.agent_pass(agent, batch) for agent in agents.agents]
    return torch.stack([nll.sum() for nll, _ in passes]).cpu(), torch.stack(
        [hidden for _, hidden in passes]
    ).cpu()


@contextmanager
def evaluating(agents: Agents):
    agents.eval()
    yield
    agents.train()


@torch.no_grad()
def reload(
    place: Path, base: PreTrainedModel, config: RunConfig, agents: Agents, batch: Batch, nll_before_K: Tensor
) -> Reload:
    """Read the checkpoint into new agents, and each agent's folder with stock PEFT; mix their answers."""
    nll_K, hidden_KBTD = answers(agents, batch)
    folder = checkpoints(place)[0]
    state = read_tensors(folder, verify(folder).optimizer_step)
    again = agents_of(config, base, config.num_agents, Execution())
    for identity, tensor in again.adapter_tensors().items():
        tensor.copy_(state.weights[identity])
    differs = float((answers(again, batch)[1].float() - hidden_KBTD.float()).abs().max())

    row_1T = batch.input_BT[:1, :PEFT_TOKENS]
    device = batch.input_BT.device
    # The agent alone on the same row: 8 bits round a row by what the other rows of its batch hold.
    with evaluating(agents):
        ours_KTV = [_logits_TV(agents, agent, row_1T) for agent in agents.agents]
    peft_differs, log_probs = 0.0, []
    for agent, ours_TV in zip(agents.agents, ours_KTV, strict=True):
        stock = PeftModel.from_pretrained(
            copy_sharing_storage(base),  # pyright: ignore[reportArgumentType]
            str(folder / "agents" / adapter_name(agent)),
        )
        stock.eval()
        theirs_TV = stock(input_ids=row_1T, use_cache=False).logits[0].float()
        peft_differs = max(peft_differs, float((ours_TV - theirs_TV).abs().max() / theirs_TV.abs().max()))
        log_probs.append(ours_TV[-1].log_softmax(-1))
    alpha = config.dirichlet_alpha_aggregator
    weight_K = uniform_weights(len(nll_K))
    if alpha is not None:
        with evaluating(agents):
            nll_KN = torch.stack([agents.agent_pass(k, batch)[0][batch.mask_BT] for k in agents.agents])
        weight_K = dirichlet_weights(-nll_KN.cpu(), alpha)
    mixed_V = mixture_log_prob(torch.stack(log_probs), weight_K.to(device))
    return Reload(
        unchanged=[k for k in agents.agents if float(nll_K[k]) == float(nll_before_K[k])],
        differs=differs,
        peft_differs=peft_differs,
        probability=float(mixed_V.double().exp().sum()),
        weights=float(weight_K.double().sum()),
    )


def _logits_TV(agents: Agents, agent: int, row_1T: Tensor) -> Tensor:
    with agents.trunk(agent) as trunk:
        return agents.head().logits(trunk(input_ids=row_1T, use_cache=False).last_hidden_state)[0]


def disagreement(runs: Sequence[ModeRun]) -> float:
    """The largest relative difference of an agent's loss at a step between two modes."""
    worst = 0.0
    for run in runs[1:]:
        for ours_K, theirs_K in zip(run.losses, runs[0].losses, strict=True):
            for ours, theirs in zip(ours_K, theirs_K, strict=True):
                worst = max(worst, abs(ours - theirs) / max(abs(theirs), 1e-12))
    return worst
