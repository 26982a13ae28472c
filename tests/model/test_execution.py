"""What `auto` decides, and what is refused."""

import pytest
import torch

from chorus.config import Config
from chorus.errors import InputError
from chorus.model.execution import decide_execution, with_padding


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        ("cpu", {}, (False, False)),
        ("cuda", {}, (False, False)),  # 128 lengths
        ("cuda", {"pad_to_multiple_of": 16}, (True, True)),
        ("cuda", {"packing": True}, (True, True)),
        ("cuda", {"pad_to_multiple_of": 16, "lora_dropout": 0.1}, (False, False)),
        ("cuda", {"pad_to_multiple_of": 16, "cuda_graphs": False}, (True, False)),
        ("cpu", {"compile": True}, (True, False)),
    ],
)
def test_auto_compiles_and_records_where_few_shapes_occur_on_a_gpu(
    device: str, settings: dict, expected: tuple
):
    execution = decide_execution(Config(max_seq_length=128, **settings), torch.device(device))
    assert (execution.compiled, execution.captured) == expected


@pytest.mark.parametrize(
    ("device", "settings", "expected"),
    [
        ("cpu", {}, 1),
        ("cuda", {}, 16),
        ("cuda", {"max_seq_length": 500}, 64),
        ("cuda", {"max_seq_length": 5}, 5),
        ("cuda", {"pad_to_multiple_of": 3}, 3),
        ("cuda", {"packing": True}, 1),
        ("cuda", {"lora_dropout": 0.1}, 1),
        ("cuda", {"compile": False, "cuda_graphs": False}, 1),
    ],
)
def test_padding_auto_leaves_few_lengths_where_they_are_compiled(device: str, settings: dict, expected: int):
    config = with_padding(Config(**{"max_seq_length": 128, **settings}), torch.device(device))
    assert config.pad_to_multiple_of == expected
    if expected > 3:
        execution = decide_execution(config, torch.device(device))
        assert (execution.compiled, execution.captured, execution.may_fall_back) == (True, True, True)


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(InputError, match="key 'cuda_graphs' is true, which needs a CUDA GPU"):
        decide_execution(Config(cuda_graphs=True), torch.device("cpu"))


@pytest.mark.parametrize("key", ["compile", "cuda_graphs"])
def test_a_base_in_shards_is_neither_compiled_nor_recorded(key: str):
    with pytest.raises(InputError, match=f"key '{key}' is true, which ZeRO stage 3 does not allow"):
        decide_execution(Config(**{key: True}), torch.device("cuda"), base_in_shards=True)
    execution = decide_execution(Config(max_seq_length=8), torch.device("cuda"), base_in_shards=True)
    assert (execution.compiled, execution.captured) == (False, False)
