"""A case to measure: its configuration, its batch, and the optimiser step that is timed."""

from collections.abc import Callable
from itertools import count
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from shapes import config_of
from torch import Tensor
from transformers import PreTrainedModel

from chorus.config import Config
from chorus.data.batches import Batch, Sample, collate
from chorus.mesh import make_mesh
from chorus.model.adapters import lora_shape
from chorus.model.agents import build_agents
from chorus.model.attention import choose_attention
from chorus.model.execution import Execution
from chorus.model.kernels.decoder_layers import Recompute
from chorus.model.regularisation import Regularisation
from chorus.training.engine import Engine, start_engine
from chorus.training.objective import objective_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLAGS = ("compiled", "captured", "mixed", "packing")


class Case(NamedTuple):
    """One row of a table, before it is measured.

    Attributes:
        model: of `shapes.SHAPES`, a hub id or a folder.
        recompute, compiled, captured: as the keys gradient_checkpointing, compile and cuda_graphs. The mode
            `switching` recomputes with transformers' own gradient checkpointing.
        mixed: samples of T / 8 to T tokens, in place of T each.
        packing: several samples in a row, as with `packing: true`.
        attention, agents_per_pass: as the keys attn_implementation and agents_per_pass.
        A: as the key agent_parallel_size. B is the rows of a process, which is not touched by it.
    """

    model: str
    mode: str
    K: int
    B: int
    T: int
    recompute: Recompute = "none"
    compiled: Literal["auto"] | bool = False
    captured: Literal["auto"] | bool = False
    mixed: bool = False
    packing: bool = False
    attention: str = "auto"
    agents_per_pass: int | None = None
    A: int = 1

    @property
    def name(self) -> str:
        flags = [flag for flag in FLAGS if getattr(self, flag) is True]
        shape = f"{self.model} {self.mode} {self.K}x{self.B}x{self.T}"
        recompute = [] if self.recompute == "none" else [f"recompute-{self.recompute}"]
        groups = [] if self.agents_per_pass is None else [f"groups-of-{self.agents_per_pass}"]
        attention = [] if self.attention == "auto" else [self.attention]
        spread = [] if self.A == 1 else [f"A={self.A}"]
        return " ".join([shape, *recompute, *flags, *groups, *attention, *spread])

    @property
    def same_losses(self) -> tuple:
        """Rows with equal values here must have equal first losses of each agent."""
        return self.model, self.K, self.B, self.T, self.mixed


def run_config(case: Case, rank: int, output_dir: str = "runs/benchmark") -> Config:
    """The configuration of a case. All rows have one length, so on a GPU `auto` compiles and captures."""
    return Config(
        num_agents=case.K,
        parallel_mode=case.mode,  # pyright: ignore[reportArgumentType]
        agents_per_pass=case.agents_per_pass,
        gradient_checkpointing=case.recompute,
        compile=case.compiled,
        cuda_graphs=case.captured,
        attn_implementation=case.attention,  # pyright: ignore[reportArgumentType]
        lora_rank=rank,
        lora_alpha=2.0 * rank,
        lora_target_modules=TARGETS,
        initialize_adapters_rand=True,
        lambda_sw=0.01 if case.K > 1 else 0.0,
        batch_size=case.B,
        max_seq_length=case.T,
        pad_to_multiple_of=case.T,
        packing=case.packing,
        agent_parallel_size=case.A,
        output_dir=output_dir,
    )


def lengths_of(case: Case) -> list[int]:
    """The lengths of B samples: T; mixed: from T / 8 to T, evenly spread."""
    share_B = torch.linspace(1 / 8, 1, case.B) if case.mixed else torch.ones(case.B)
    return [round(case.T * share) for share in share_B.tolist()]


def random_batch(case: Case, vocabulary: int, device: torch.device) -> Batch:
    """B samples in which every position is a target; 16 points a sample for the sliced distance."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, vocabulary, (case.B, case.T + 1), generator=generator)
    samples = [
        Sample(ids_T[: length + 1], torch.ones(length + 1, dtype=torch.bool))
        for ids_T, length in zip(ids_BT, lengths_of(case), strict=True)
    ]
    packing = case.T + 1 if case.packing else None
    return collate(samples, pad_id=0, points_per_row=16, packing=packing).to(device)


def attention_of(case: Case, device: torch.device, dtype: torch.dtype, compiled: bool) -> str:
    """The attention that Chorus takes for this row; each baseline has its own."""
    if case.mode == "switching":
        return "eager"
    if case.mode == "tuned switching":
        return "flex_attention" if device.type == "cuda" else "eager"  # flex has no backward on a CPU
    how = {"length": case.T, "compiled": compiled, "packing": case.packing}
    return choose_attention(case.attention, config_of(case.model), device, dtype, **how) or "eager"


def start(config: Config, base: PreTrainedModel, execution: Execution, accelerator: Accelerator) -> Engine:
    """Chorus' agents on `base`, under its engine, as in train.py."""
    rates = Regularisation(config.dropconnect_p, config.lora_dropout, config.seed)
    mesh = make_mesh(accelerator, int(config.agent_parallel_size))
    how = (int(config.num_agents), lora_shape(config), rates, execution)
    agents = build_agents(config.parallel_mode, base, *how, mesh=mesh)
    return start_engine(accelerator, agents, config, mesh)


def step_of(engine: Engine, config: Config, batch: Batch) -> Callable[[], Tensor]:
    """An optimiser step of one micro-batch, as train.py's loop takes it; gives the mean NLL before it of each
    agent of this process."""
    loss_fn, steps = objective_of(config, config, engine.mesh), count()
    own_targets = len(batch.target_rows_N)

    def step() -> Tensor:
        now = next(steps)
        with engine.micro_batch(is_last=True):
            output = engine.module(batch, step=now)
            part = loss_fn(*output, batch, num_targets=own_targets * engine.mesh.data_size, step=now)
            engine.backward(part.share)
        engine.step(config.lr)
        return part.nll_K / own_targets

    return step
