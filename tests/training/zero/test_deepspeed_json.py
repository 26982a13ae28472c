import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from settled_json import AUTO, ZERO, refusal, settled

from chorus.config import Config
from chorus.errors import InputError
from chorus.training.zero.deepspeed_json import deepspeed_json, leave_clipping_to_chorus

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ds.json"


# ---- what is filled in ----


@pytest.mark.parametrize("content", [AUTO, ZERO], ids=["auto", "absent"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_what_the_json_leaves_open_is_filled_from_the_configuration(
    file: Path, content: dict, precision: str
):
    assert settled(file, content, precision) == {
        **ZERO,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "gradient_clipping": 0.7,  # DeepSpeed itself reads an absent one as 1.0
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": 3,
        "train_batch_size": 3 * 4 * 2,
        "zero_force_ds_cpu_optimizer": False,  # where it keeps the state on the CPU, torch's AdamW stays
    }


def test_no_clipping_is_filled_in_as_no_clipping(file: Path):
    assert settled(file, ZERO, max_grad_norm=0.0)["gradient_clipping"] == 0


def test_values_that_agree_are_accepted(file: Path):
    agreeing = {
        **ZERO,
        "gradient_clipping": 2,  # the same number as 2.0
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": 3,
        "train_batch_size": 24,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_force_ds_cpu_optimizer": False,
    }
    assert settled(file, agreeing, "bf16", max_grad_norm=2.0) == agreeing


def test_other_settings_of_deepspeed_pass_through(file: Path):
    content = {
        "zero_optimization": {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1000},
        "steps_per_print": 10,
        "fp16": {"loss_scale_window": 100},
    }
    result = settled(file, content, "fp16")
    assert result["zero_optimization"] == content["zero_optimization"]
    assert result["steps_per_print"] == 10
    assert result["fp16"] == {"loss_scale_window": 100, "enabled": True}


def test_null_uses_the_built_in_settings_and_never_changes_them():
    first = settled(None)
    first["zero_optimization"]["stage"] = 3
    second = settled(None)
    assert second["zero_optimization"]["stage"] == 2
    assert second["zero_optimization"]["reduce_bucket_size"] <= 50_000_000
    assert second["gradient_clipping"] == 0.7


@pytest.mark.parametrize(
    "name", ["ds_config_zero2", "recipes/deepspeed/zero3", "recipes/deepspeed/zero2_cpu_offload"]
)
def test_the_files_of_the_repository_are_accepted_with_the_configuration_of_the_repository(name: str):
    path = REPOSITORY / f"{name}.json"
    config = Config(deepspeed_config_file=str(path))
    result = deepspeed_json(config, config, "bf16", 4, {})
    assert result["zero_optimization"] == json.loads(path.read_text())["zero_optimization"]
    result["zero_optimization"].pop(
        "stage3_param_persistence_threshold", None
    )  # Accelerate knows: 10 x hidden_size
    assert "auto" not in json.dumps(result)


def test_deepspeed_itself_takes_the_result_and_reads_it_as_meant(file: Path):
    """The real parser. With an absent clipping it would answer 1.0."""

    for content in (AUTO, ZERO):
        read = DeepSpeedConfig(settled(file, content, "bf16", num_processes=1))
        assert read.gradient_clipping == 0.7
        assert (read.train_batch_size, read.train_micro_batch_size_per_gpu) == (12, 3)
        assert (read.gradient_accumulation_steps, read.zero_optimization_stage) == (4, 2)
        assert read.bfloat16_config.enabled
        assert not read.float16_config.enabled


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_is_told_to_look_at_no_gradient(file: Path, precision: str, stage: int):
    content = {"zero_optimization": {"stage": stage}}
    read = DeepSpeedConfig(leave_clipping_to_chorus(settled(file, content, precision, num_processes=1)))
    assert read.gradient_clipping == 0
    assert not read.zero_config.compute_grad_norm
    assert precision == "no" or not read.bfloat16_config.check_grad_overflow


@pytest.mark.parametrize(
    ("zero", "precision"),
    [
        ({"stage": 2}, "fp16"),
        ({"stage": 3}, "bf16"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16"),
    ],
)
def test_where_deepspeed_must_clip_it_does(file: Path, zero: dict, precision: str):
    settings = settled(file, {"zero_optimization": zero}, precision)
    assert leave_clipping_to_chorus(settings) == settings


def test_a_norm_that_the_json_asks_of_deepspeed_is_refused(file: Path):
    settings = settled(file, {"zero_optimization": {"stage": 2, "compute_grad_norm": True}})
    said = "key 'zero_optimization.compute_grad_norm' is True, but Chorus itself takes the norm"
    with pytest.raises(InputError, match=said):
        leave_clipping_to_chorus(settings)


# ---- what is refused: the file, the key, both values ----


@pytest.mark.parametrize(
    ("key", "theirs", "ours"),
    [
        ("gradient_clipping", 1.0, 0.7),
        ("gradient_clipping", True, 0.7),
        ("gradient_accumulation_steps", 1, 4),
        ("gradient_accumulation_steps", "4", 4),
        ("train_micro_batch_size_per_gpu", 16, 3),
        ("train_batch_size", 12, 24),
        ("train_batch_size", None, 24),
        ("train_batch_size", [24], 24),
    ],
)
def test_a_value_that_contradicts_the_configuration_is_refused(
    file: Path, key: str, theirs: object, ours: object
):
    message = refusal(file, {**ZERO, key: theirs})
    assert message.startswith(f"{file}: key '{key}' is {theirs!r}, but configs.yaml makes it {ours!r}")
    assert '"auto"' in message


@pytest.mark.parametrize(
    ("section", "theirs", "precision", "ours"),
    [
        ("bf16", True, "no", False),
        ("bf16", False, "bf16", True),
        ("fp16", True, "bf16", False),
        ("bf16", 1, "bf16", True),  # true is not 1
        ("fp16", 0, "no", False),
    ],
)
def test_another_precision_is_refused(file: Path, section: str, theirs: object, precision: str, ours: bool):
    message = refusal(file, {**ZERO, section: {"enabled": theirs}}, precision)
    assert (
        f"{file}: key '{section}.enabled' is {theirs!r}, but configs.yaml makes it {ours!r} (mixed_precision)"
        in (message)
    )


def test_true_is_not_the_number_1(file: Path):
    message = refusal(file, {**ZERO, "gradient_accumulation_steps": True}, gradient_accumulation_steps=1)
    assert "key 'gradient_accumulation_steps' is True, but configs.yaml makes it 1" in message


@pytest.mark.parametrize("section", [True, "auto", None, ["enabled"]])
def test_a_precision_that_is_no_section_is_refused(file: Path, section: object):
    message = refusal(file, {**ZERO, "bf16": section})
    assert message == f'{file}: key \'bf16\' is {section!r}; give {{"enabled": "auto"}}'


@pytest.mark.parametrize("stage", [0, 4, None, "2", True, 1.5, "auto"])
def test_every_zero_stage_but_1_2_and_3_is_refused(file: Path, stage: object):
    message = refusal(file, {"zero_optimization": {"stage": stage}})
    assert message.startswith(f"{file}: key 'zero_optimization.stage' is {stage}; give 1, 2 or 3")


@pytest.mark.parametrize("content", [{}, {"zero_optimization": {}}, {"zero_optimization": True}])
def test_a_json_without_a_zero_stage_is_refused(file: Path, content: dict):
    assert f"{file}: key 'zero_optimization.stage'" in refusal(file, content)
