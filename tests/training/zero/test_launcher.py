import socket
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from chorus.config import Config
from chorus.errors import InputError, RunError
from chorus.training.zero.launcher import check_launcher, deepspeed_wanted, meeting_failures_named


@pytest.mark.parametrize(
    ("launcher", "key", "wanted"),
    [
        ("true", "auto", True),
        ("false", "auto", False),
        (None, "auto", False),
        ("true", True, True),
        ("false", True, True),
        ("false", False, False),
    ],
)
def test_deepspeed_runs_as_the_launcher_says_or_the_key_insists(launcher: str | None, key: Any, wanted: bool):
    environment = {} if launcher is None else {"ACCELERATE_USE_DEEPSPEED": launcher}
    assert deepspeed_wanted(Config(use_deepspeed=key), environment) is wanted


def test_a_launcher_that_starts_deepspeed_against_the_key_is_refused():
    with pytest.raises(InputError, match="'use_deepspeed' is false, but the launcher starts DeepSpeed"):
        deepspeed_wanted(Config(use_deepspeed=False), {"ACCELERATE_USE_DEEPSPEED": "true"})


@pytest.mark.parametrize(
    ("variable", "theirs", "key", "ours"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision", "no"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision", "auto"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "gradient_accumulation_steps", 4),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", "max_grad_norm", 0.5),
    ],
)
def test_a_launcher_that_contradicts_the_configuration_is_refused(
    variable: str, theirs: str, key: str, ours: Any
):
    words = rf"^key '{key}' is {ours}, but the launcher (says|clips at) {theirs}; .*drop .*\Z"
    config = Config(**{key: ours})
    with pytest.raises(InputError, match=words):
        check_launcher(config, config, {variable: theirs})


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "launcher asks for FSDP, .*; launch with --multi_gpu, or with"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "asks for dynamo_backend INDUCTOR, .* key 'compile'"),
        ({"WORLD_SIZE": "two"}, "variable WORLD_SIZE is 'two'; give an integer, or unset it"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "variable RANK is 2, and WORLD_SIZE is 2; give each"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1"}, "WORLD_SIZE is 2, and MASTER_ADDR is not set; start the"),
    ],
)
def test_what_a_launcher_asks_for_beyond_configs_yaml_is_refused(environment: dict[str, str], said: str):
    """Accelerate itself would wrap the agents in another engine, or in a second compilation, silently."""
    with pytest.raises(InputError, match=said):
        check_launcher(Config(), Config(), environment)


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, "Timed out after . seconds waiting for clients. 1/2 clients joined"),
        (1, "client socket has timed"),
    ],
)
def test_processes_that_do_not_meet_say_where_they_waited(rank: int, said: str):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    known = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = rf"^process {rank}: the 2 processes of this run did not meet at 127.0.0.1:{port} \(.*{said}.*\); "
    with pytest.raises(RunError, match=words), meeting_failures_named(known):
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=1),
        )


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "1", "RANK": "0"},
        # what `accelerate launch` sets unasked, and what agrees
        {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_GRADIENT_CLIPPING": "none", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"},
        {"ACCELERATE_GRADIENT_CLIPPING": "0.50"},
    ],
)
def test_a_launcher_that_agrees_or_says_nothing_is_accepted(environment: dict[str, str]):
    config = Config(mixed_precision="bf16", gradient_accumulation_steps=4, max_grad_norm=0.5)
    check_launcher(config, config, environment)
