"""The launcher's DeepSpeed settings, compared with configs.yaml, and a rendezvous for a single process."""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed

from chorus.config.engine import EngineSettings
from chorus.config.training import TrainingSettings
from chorus.errors import InputError, RunError

FOREIGN_ENGINES = {  # that Accelerate would start without a word from configs.yaml
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def deepspeed_wanted(settings: EngineSettings, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this run uses DeepSpeed: as the launcher says, or because `use_deepspeed` is true.

    Raises:
        InputError: the launcher asks for DeepSpeed and `use_deepspeed` is false.
    """
    launcher = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if launcher and settings.use_deepspeed is False:
        raise InputError(
            "key 'use_deepspeed' is false, but the launcher starts DeepSpeed; set it to auto or "
            "launch without"
        )
    return launcher or settings.use_deepspeed is True


def check_launcher(
    engine: EngineSettings, training: TrainingSettings, environment: Mapping[str, str] = os.environ
) -> None:
    """Refuse settings of the launcher that contradict configs.yaml. Accelerate would silently prefer one of
    them.

    Raises:
        InputError: names the key, both values and the remedy.
    """
    _check_processes(environment)
    for variable, name in FOREIGN_ENGINES.items():
        if environment.get(variable, "false").lower() == "true":
            raise InputError(
                f"the launcher asks for {name}, with which agents cannot be trained; launch with "
                "--multi_gpu, or with --config_file accelerate_config.yaml for DeepSpeed"
            )
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise InputError(
            f"the launcher asks for dynamo_backend {dynamo}, which would compile the agents once more; leave "
            "it to key 'compile' and drop it from the launcher's options and its config file"
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", engine.mixed_precision):  # the launcher also sets "no" by default
        raise InputError(
            f"key 'mixed_precision' is {engine.mixed_precision}, but the launcher says {precision}; "
            "leave it to configs.yaml and drop it from the launcher's options and its config file"
        )
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation not in ("1", "auto", str(training.gradient_accumulation_steps)):
        raise InputError(
            f"key 'gradient_accumulation_steps' is {training.gradient_accumulation_steps}, but the launcher "
            f"says {accumulation}; leave it to configs.yaml and drop it from the launcher's options and its "
            "config file"
        )
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto") and float(clipping) != training.max_grad_norm:
        raise InputError(
            f"key 'max_grad_norm' is {training.max_grad_norm}, but the launcher clips at {clipping}; "
            "leave it to configs.yaml and drop it from the launcher's options and its config file"
        )


def _check_processes(environment: Mapping[str, str]) -> None:
    """What a launcher says of the processes, or a user who starts them by hand."""
    for name in ("WORLD_SIZE", "RANK"):
        if not environment.get(name, "0").isdecimal():
            raise InputError(f"variable {name} is {environment[name]!r}; give an integer, or unset it")
    size, rank = int(environment.get("WORLD_SIZE", 1)), int(environment.get("RANK", 0))
    if "WORLD_SIZE" in environment and rank >= size:
        raise InputError(
            f"variable RANK is {rank}, and WORLD_SIZE is {size}; give each process one from 0 on"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not environment.get(name):
            raise InputError(
                f"variable WORLD_SIZE is {size}, and {name} is not set; start the processes with accelerate "
                "launch or torchrun, or set it alike for all of them"
            )


@contextmanager
def meeting_failures_named(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Raise RunError, with what to look at, if the processes of a run do not find each other."""
    try:
        yield
    except torch.distributed.DistError as error:
        rank, size, host, port = map(environment.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        said = str(error).partition("\n")[0].rstrip(".")
        raise RunError(
            f"process {rank}: the {size} processes of this run did not meet at {host}:{port} ({said}); start "
            "all of them, with a MASTER_ADDR that each can reach and a MASTER_PORT that is free"
        ) from error


def single_process_rendezvous() -> None:
    """Set the environment that a distributed launcher sets, for `use_deepspeed: true` in a single process."""
    if "LOCAL_RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update(alone)


def look_up_no_operators() -> None:
    """Keep DeepSpeed from compiling, or looking up, its operator for inference on CPUs, which training does
    not call.

    It would do so at every start, under a lock that is a mere file: after a kill at that moment every later
    start waits for it forever. Call it before the process group exists.
    """
    import deepspeed.ops  # takes seconds: imported only when needed

    deepspeed.ops.__dict__["__compatible_ops__"] = {}
