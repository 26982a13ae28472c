"""The first checks of the dry run: a writable folder, one configuration, working communication."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator

from chorus.checkpoint.output_dir import refuse_taken, refuse_unshared, refuse_unusable
from chorus.collectives import on_every_process, on_first_process, refuse_differences
from chorus.config import Config
from chorus.errors import InputError
from chorus.planning.checks import Report


@contextmanager
def folder_beside_output(report: Report, config: Config, accelerator: Accelerator) -> Iterator[Path]:
    """A temporary folder on the disk of `output_dir`. Nothing is written into `output_dir` itself."""
    output_dir = Path(config.output_dir)
    with report.trying("output_dir can be written"):
        on_every_process(partial(refuse_unusable, output_dir, resumed=False))
        on_first_process(accelerator, partial(refuse_taken, output_dir))
        beside = next(path for path in output_dir.absolute().parents if path.exists())
        made = on_first_process(accelerator, lambda: _make_folder(beside))
    report.add("output_dir can be written", True, f"{config.output_dir} itself is left alone")
    try:
        yield made
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(made, ignore_errors=True)


def _make_folder(beside: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=".chorus-dry-run-", dir=beside))
    except OSError as error:
        raise InputError(
            f"key 'output_dir': no folder can be made in {beside}: {error.strerror}; name another"
        ) from error


def check_processes(report: Report, config: Config, accelerator: Accelerator, folder: Path) -> None:
    """Check that all processes have the same configuration and output folder, and can communicate."""
    count = accelerator.num_processes
    with report.trying("processes have one configuration"):
        own = sha256(config.model_dump_json().encode()).hexdigest()
        refuse_differences(
            {"the digest of the configuration": own, "torch's version": str(torch.__version__)}
        )
        report.add(
            "processes have one configuration", True, f"as has the first of {count}, and one version of torch"
        )
    with report.trying("processes see one output_dir"):
        on_every_process(partial(refuse_unshared, folder))
        report.add(
            "processes see one output_dir", True, f"{count} of {count} see what the first one makes there"
        )
    summed = accelerator.reduce(
        torch.tensor([accelerator.process_index + 1.0], device=accelerator.device), "sum"
    )
    report.add(
        "an all-reduce gives the right sum",
        float(cast(torch.Tensor, summed)) == count * (count + 1) / 2,
        f"1 + ... + {count} = {float(cast(torch.Tensor, summed)):g}",
        "look at the network between the processes: NCCL_DEBUG=INFO tells more",
    )
