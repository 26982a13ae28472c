"""Three toy agents and their export."""

from pathlib import Path
from typing import Any

from torch import Tensor
from toy import ALPHA, RANK, TARGETS

from chorus.checkpoint.export import save_ensemble
from chorus.config import Config
from chorus.model.adapters import TensorId
from chorus.model.agents import Agents

WEIGHTS = [0.5, 0.3, 0.2]
CONFIG = Config(
    model_name="some/base",
    num_agents=3,
    lora_rank=RANK,
    lora_alpha=ALPHA,
    lora_target_modules=list(TARGETS),
    prompt_template="“{question}”\n#: ",
    lr=3e-5,
    max_train_steps=None,
)


def values(agents: Agents) -> dict[TensorId, Tensor]:
    return {identity: tensor.detach() for identity, tensor in agents.adapter_tensors().items()}


def save(folder: Path, agents: Agents, config: Config = CONFIG, **more: Any) -> None:
    save_ensemble(folder, values(agents), WEIGHTS, config, more)
