"""Checkpoints that someone has edited so that the manifest vouches for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chorus.checkpoint.manifest import write_manifest


def vouch(folder: Path) -> None:
    """Write a manifest of what is there now."""
    write_manifest(folder, num_agents=2)


def edit_state(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change `state.json` by `edit`, under a manifest that fits."""
    file = folder / "state.json"
    state = json.loads(file.read_text())
    edit(state)
    file.write_text(json.dumps(state))
    vouch(folder)


def set_entry(state: dict[str, Any], path: str, value: Any) -> None:
    """Set the entry at `path`, such as `config.batch_size`."""
    *outer, last = path.split(".")
    for name in outer:
        state = state[name]
    state[last] = value
