import json
import os
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from chorus.config import Config
from chorus.errors import InputError
from chorus.training.zero.deepspeed_json import deepspeed_json, leave_clipping_to_chorus

REPOSITORY = Path(__file__).parents[3]
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


@pytest.mark.parametrize(
    ("stage", "name", "device", "remedy"),
    [
        (2, "offload_optimizer", "nvme", "give cpu or none"),
        (3, "offload_param", "nvme", "give cpu or none"),
        (2, "offload_param", "cpu", "it needs stage 3"),
    ],
)
def test_an_offload_that_is_not_supported_is_refused(
    file: Path, stage: int, name: str, device: str, remedy: str
):
    message = refusal(file, {"zero_optimization": {"stage": stage, name: {"device": device}}})
    assert message == f"{file}: key 'zero_optimization.{name}.device' is '{device}'; {remedy}"


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"overlap_com": True}, ".overlap_com' is not known; did you mean 'zero_optimization.overlap_comm'?"),
        ({"offload_optimizer": {**CPU, "pin": 1}}, ".offload_optimizer.pin' is not known; remove it"),
        ({"reduce_bucket_size": -1}, ".reduce_bucket_size' is -1: "),
        ({"overlap_comm": "perhaps"}, ".overlap_comm' is 'perhaps': "),
        ({"compute_grad_norm": False, "stage": 3}, "' is refused: compute_grad_norm=false "),
        (
            {"cpu_offload": True},
            '.cpu_offload\' is an old name; give "offload_optimizer": {"device": "cpu"} ',
        ),
        ({"offload_optimizer": {**CPU, "ratio": 0.5}}, ".offload_optimizer.ratio' is 0.5, but Chorus keeps "),
    ],
)
def test_what_deepspeed_would_refuse_in_its_section_is_refused_before_a_model_is_loaded(
    file: Path, wrong: dict, said: str
):
    message = refusal(file, {"zero_optimization": {"stage": 2, **wrong}})
    assert message.startswith(f"{file}: key 'zero_optimization{said}")
    assert len(message) < 300, "the whole section is not repeated"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bf16": {"enabled": "auto", "foo": 1}}, "'bf16.foo' is not known; remove it"),
        ({"fp16": {"loss_scale": "x"}}, "'fp16.loss_scale' is 'x': fp16.loss_scale must be a number; "),
        ({"communication_data_type": "fp8"}, "'communication_data_type' is 'fp8': "),
        ({"timers": {"throughput": 3}}, "'timers' is {'throughput': 3}: "),
        ({"data_types": 3}, "'data_types' is 3; give a JSON object, or remove it"),
        ({"gradient_predivide_factor": True}, "'gradient_predivide_factor' is True; give a number, "),
        ({"prescale_gradients": 1}, "'prescale_gradients' is 1; give true or false, or remove it"),
        ({"zero_force_ds_cpu_optimizer": True}, "'zero_force_ds_cpu_optimizer' is True, but "),
    ],
)
def test_what_deepspeed_would_refuse_elsewhere_is_refused_in_one_line_as_well(
    file: Path, wrong: dict, said: str
):
    assert refusal(file, {**ZERO, **wrong}).startswith(f"{file}: key {said}")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("gradient_cliping", "gradient_clipping"), ("train_batchsize", "train_batch_size"), ("bf_16", "bf16")],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(file: Path, key: str, nearest: str):
    message = refusal(file, {**ZERO, key: 1.0})
    assert message == f"{file}: key '{key}' is not known; did you mean '{nearest}'?"


def test_an_unknown_key_like_no_other_is_refused_without_a_guess(file: Path):
    assert refusal(file, {**ZERO, "qqqq": 1}) == f"{file}: key 'qqqq' is not known; remove it"


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("optimizer", "weight_decay"),
        ("scheduler", "lr_scheduler_type"),
        ("amp", "mixed_precision"),
        ("activation_checkpointing", "gradient_checkpointing"),
    ],
)
def test_a_section_that_configs_yaml_decides_is_refused_with_the_key_that_does(
    file: Path, key: str, instead: str
):
    message = refusal(file, {**ZERO, key: {}})
    assert message.startswith(f"{file}: key '{key}' cannot be used")
    assert instead in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"zero_optimization": {"stage": 2}, "timers": 1, "timers": 1}', "key 'timers' appears twice"),
        ('{"zero_optimization": {"stage": 2, "stage": 2}}', "key 'stage' appears twice"),
        ("{'stage': 2}", "not valid JSON"),
        ("", "not valid JSON"),
        ('{"zero_optimization": {"stage": 2}} # two', "not valid JSON"),
        ("[2]", "holds a list; give a JSON object"),
        ("2", "holds a int; give a JSON object"),
    ],
)
def test_a_file_that_is_no_plain_json_object_is_refused(file: Path, content: str, reason: str):
    message = refusal(file, content)
    assert message.startswith(f"{file}: ")
    assert reason in message


def test_a_file_that_is_no_text_is_refused(file: Path):
    file.write_bytes(b'{"timers": "\xff"}')
    assert refusal(file).startswith(f"{file}: not valid JSON")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    missing = tmp_path / "missing.json"
    said = "cannot be read: No such file or directory; check the path, or set it to null"
    assert refusal(missing) == f"key 'deepspeed_config_file': {missing} {said}"
    assert "Is a directory" in refusal(tmp_path)


# ---- what a line says to do is done, and the error is gone ----


@pytest.mark.parametrize(
    ("wrong", "line", "mended"),
    [
        ({**ZERO, "gradient_clipping": 0.5}, 'write "auto" there', {**ZERO, "gradient_clipping": "auto"}),
        ({**ZERO, "bf16": True}, 'give {"enabled": "auto"}', {**ZERO, "bf16": {"enabled": "auto"}}),
        ({**ZERO, "wall_clock_breakdown": 1}, "give true or false", {**ZERO, "wall_clock_breakdown": True}),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            'give "offload_optimizer": {"device": "cpu"}',
            {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}},
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": CPU}},
            "needs stage 3",
            {"zero_optimization": {"stage": 3, "offload_param": CPU}},
        ),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": True}}, "remove it", ZERO),
    ],
)
def test_the_remedy_that_a_line_about_the_json_names_helps(file: Path, wrong: dict, line: str, mended: dict):
    with pytest.raises(InputError) as error:
        leave_clipping_to_chorus(settled(file, wrong))
    assert line in str(error.value)
    leave_clipping_to_chorus(settled(file, mended))


# ---- the launcher ----


def test_launcher_and_configuration_must_name_the_same_file(file: Path, tmp_path: Path):
    file.write_text(json.dumps(ZERO))
    named = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": os.path.relpath(file)}
    assert settled(file, environment=named)["zero_optimization"] == {"stage": 2}
    assert settled(None, environment=named)["zero_optimization"] == {"stage": 2}, "null follows the launcher"
    other = tmp_path / "other.json"
    message = refusal(other, environment=named)
    assert all(word in message for word in ("'deepspeed_config_file'", str(other), os.path.relpath(file)))


@pytest.mark.parametrize("content", [ZERO, None], ids=["file", "built in"])
def test_a_zero_stage_of_the_launcher_must_be_that_of_the_json(file: Path, content: dict | None):
    place = file if content else None
    assert settled(place, content, environment={"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"})
    asked = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    message = refusal(place, content, environment=asked)
    recipe = REPOSITORY / "recipes" / "deepspeed" / "zero3.json"
    assert str(recipe.relative_to(REPOSITORY)) in message
    assert settled(recipe, environment=asked)["zero_optimization"]["stage"] == 3, "as the line says"
    assert "key 'zero_optimization.stage' is 2, but the launcher says 3" in message


def test_an_offload_of_the_launcher_must_be_that_of_the_json(file: Path):
    environment = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    assert "offload_optimizer.device' is none, but the launcher says cpu" in refusal(
        file, ZERO, environment=environment
    )
    settled(file, ZERO, environment={"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"})
