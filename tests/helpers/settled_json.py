"""The DeepSpeed JSON of a test, settled with a configuration."""

import json
from pathlib import Path
from typing import Any

import pytest

from chorus.config import Config
from chorus.errors import InputError
from chorus.training.zero.deepspeed_json import deepspeed_json

ZERO = {"zero_optimization": {"stage": 2}}
AUTO = {
    **ZERO,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}


def settled(
    file: Path | None,
    content: object = None,
    precision: str = "no",
    num_processes: int = 2,
    environment: dict[str, str] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """`deepspeed_json` of a file with this content (text, or
    written as JSON) under a launcher that says nothing."""
    if file is not None and content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    keys = {"batch_size": 3, "gradient_accumulation_steps": 4, "max_grad_norm": 0.7, **keys}
    config = Config(deepspeed_config_file=None if file is None else str(file), **keys)
    return deepspeed_json(config, config, precision, num_processes, environment or {})


def refusal(*arguments: Any, **keys: Any) -> str:
    with pytest.raises(InputError) as error:
        settled(*arguments, **keys)
    message = str(error.value)
    assert "\n" not in message
    return message
