"""The machine, versions and commit that a figure was measured with."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

NO_CONDITION = ("--out", "--minutes", "--arms")  # options that change no figure


def conditions(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": name,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "deepspeed": version("deepspeed"),
        "driver": driver_version() if device.type == "cuda" else "none",
        "commit": git.stdout.strip() or "unknown",
        "command": shlex.join(["python", *_telling(sys.argv)]),
    }


def _telling(arguments: Sequence[str]) -> list[str]:
    """The arguments without `NO_CONDITION` and their values."""
    told, is_told = list(arguments[:1]), True
    for one in arguments[1:]:
        if one.startswith("--"):
            is_told = one not in NO_CONDITION
        if is_told:
            told.append(one)
    return told


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else "unknown"
