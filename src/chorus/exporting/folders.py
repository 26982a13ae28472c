"""The folders of an export: written under a temporary name, and renamed when they are complete."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from chorus.checkpoint.atomic_files import disk_errors, json_text, save_tensors, sync
from chorus.checkpoint.manifest import ADAPTER_CONFIG, ADAPTER_FILE
from chorus.ensemble.adapter_files import AdapterFile
from chorus.errors import InputError
from chorus.exporting.merge import MeanAdapter, mean_adapter
from chorus.model.targets import peft_target_modules

PATTERNS = ("rank_pattern", "alpha_pattern")


def refuse_used(out: Path) -> None:
    """Raise InputError where `out` is a file, is not empty, or cannot be made. Changes nothing."""
    try:
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            what = "is a file" if out.is_file() else "is not empty"
            raise InputError(f"{out}: {what}, and an export overwrites nothing; name a new folder")
        nearest = next(path for path in out.absolute().parents if path.exists())
    except OSError as error:
        raise InputError(f"{out}: {error.strerror}; name a folder that can be made") from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{out}: {nearest} cannot be written; name a folder that can be made")


@contextmanager
def new_folder(out: Path, num_bytes: int) -> Iterator[Path]:
    """A new folder beside `out`, renamed to `out` once everything is written and flushed.

    After an error, or if the process is killed, `out` is unchanged. A killed process leaves the unfinished
    folder, whose name begins with a dot.

    Args:
        num_bytes: about what will be written, for the message.

    Raises:
        RunError: the write failed.
    """
    place = Path(os.path.realpath(out))  # a link to an empty folder stays a link
    new = place.with_name(f".{place.name}.{uuid4().hex[:8]}.unfinished")
    with disk_errors(out, num_bytes, "make room, or name another folder"):
        new.mkdir(parents=True)
        try:
            yield new
            for path in [*new.rglob("*"), new]:
                sync(path)
            new.replace(place)
            sync(place.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def write_agent(folder: Path, adapter: AdapterFile, base_name: str, skeleton: PreTrainedModel) -> None:
    """Write one agent's folder: its files, unchanged except for the name of the base.

    An adapter whose layers differ in rank or scaling is rewritten with one rank and a scaling of 1 on all
    layers, which computes the same: vLLM uses the folder's `r` and `lora_alpha` for all layers.
    """
    entries = json.loads((adapter.folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if any(entries.get(name) for name in PATTERNS):
        write_adapter(folder, mean_adapter([adapter], [1.0]), base_name, skeleton)
        return
    folder.mkdir()
    shutil.copyfile(adapter.folder / ADAPTER_FILE, folder / ADAPTER_FILE)
    named = {**entries, "base_model_name_or_path": base_name}
    (folder / ADAPTER_CONFIG).write_text(json_text(named), encoding="utf-8")


def write_adapter(folder: Path, adapter: MeanAdapter, base_name: str, skeleton: PreTrainedModel) -> None:
    """Write an ordinary PEFT folder.

    Args:
        skeleton: the base's modules, without weights.
    """
    modules = dict(skeleton.named_modules())
    folder.mkdir(exist_ok=True)
    tensors: Mapping[str, Tensor] = {
        f"base_model.model.{layer}.lora_{letter}.weight": matrix.contiguous()
        for layer, pair in adapter.matrices.items()
        for letter, matrix in zip("AB", pair, strict=True)
    }
    save_tensors(tensors, folder / ADAPTER_FILE, {"format": "pt"})
    targets = peft_target_modules(list(adapter.matrices), list(modules))
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.rank,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(modules[layer], Conv1D) for layer in adapter.matrices),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    config.target_modules = targets  # PEFT holds names as a set: other bytes in every process
    config.save_pretrained(str(folder))
