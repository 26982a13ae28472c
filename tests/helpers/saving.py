"""Small training states and checkpoints of them."""

from pathlib import Path

import torch

from chorus.checkpoint.store import (
    write_checkpoint,
)
from chorus.config import Config
from chorus.model.adapters import TensorId
from chorus.training.state import MOMENTS, TrainingState

CONFIG = Config(model_name="some/base", num_agents=2, save_total_limit=2)
IDENTITIES = [
    TensorId(k, f"base_model.model.{name}", m) for k in range(2) for name in "xy" for m in ("A", "B")
]


def state_of(value: float) -> TrainingState:
    tensors = [{identity: torch.full((2, 3), value + i) for identity in IDENTITIES} for i in range(3)]
    return TrainingState(tensors[0], dict(zip(MOMENTS, tensors[1:], strict=True)), optimizer_step=int(value))


def save(folder: Path, step: int, config: Config = CONFIG) -> Path:
    facts = {"format": 1, "step": step, "optimizer_step": step}
    return write_checkpoint(folder, state_of(float(step)), facts, config)
