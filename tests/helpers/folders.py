"""What lies in a folder, such as one that a run has left."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def adapters(output_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's exported agents, by agent and name."""
    return {
        f"{folder.name} {name}": tensor
        for folder in sorted((output_dir / "agents").iterdir())
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
