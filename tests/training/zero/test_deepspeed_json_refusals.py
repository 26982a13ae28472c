"""Errors of the DeepSpeed JSON: values that DeepSpeed refuses, unknown keys, unreadable files, and a launcher
that contradicts it."""

import json
import os
from pathlib import Path

import pytest
from settled_json import ZERO, refusal, settled

from chorus.errors import InputError
from chorus.training.zero.deepspeed_json import (
    UNCHECKED,
    leave_clipping_to_chorus,
    refusals_of_deepspeed,
)

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ds.json"


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
        ({"timers": {"throughput": 3}}, "'timers.throughput' is 3; give a JSON object, or remove it"),
        ({"timers": {"throughput": {"enabled": "x"}}}, "'timers.throughput.enabled' is 'x': "),
        ({"timers": {"troughput": {}}}, "'timers.troughput' is not known; did you mean 'timers.throughput'?"),
        ({"data_types": {"grad_accum_dtype": "fp3"}}, "'data_types.grad_accum_dtype' is 'fp3'; give fp32, "),
        ({"data_types": {"grad_dtype": "fp32"}}, "'data_types.grad_dtype' is not known; "),
        ({"flops_profiler": {"profile_step": "x"}}, "'flops_profiler.profile_step' is 'x'; give a number, "),
        ({"flops_profiler": {"profil_step": 1}}, "'flops_profiler.profil_step' is not known; did you mean "),
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


def test_null_for_a_text_is_taken_as_in_deepspeeds_documentation(file: Path):
    more = {"data_types": {"grad_accum_dtype": None}, "flops_profiler": {"output_file": None}}
    assert (
        settled(file, {**ZERO, **more, "communication_data_type": None})["data_types"] == more["data_types"]
    )


def test_the_names_of_deepspeeds_own_profiler_are_known():
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig

    assert vars(DeepSpeedFlopsProfilerConfig({})).keys() == UNCHECKED["flops_profiler"].keys()


def test_an_error_that_deepspeed_did_not_raise_is_not_blamed_on_its_json():
    with pytest.raises(ValueError, match="no element"), refusals_of_deepspeed():
        raise ValueError("no element")


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
