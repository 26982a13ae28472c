"""Keys that contradict each other are refused; those that go together are read."""

import pytest
from loading import load, refusal

import chorus.config.load
from chorus.config import Config

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.mark.parametrize(
    ("text", "arguments", "place"),
    [
        ("num_agents: 1\nlambda_sw: 0.1", [], "configs.yaml: key 'lambda_sw' (line 2) is 0.1; "),
        ("lambda_sw: 0.1", ["num_agents=1"], "configs.yaml: key 'lambda_sw' (line 1) is 0.1; "),
        ("num_agents: 1", ["lambda_sw=0.1"], "command line: key 'lambda_sw' is 0.1; "),
    ],
)
def test_a_distance_with_one_agent_is_refused(text, arguments, place):
    message = refusal(text, *arguments)
    assert message.startswith(place)
    assert message.endswith("num_agents is 1; set lambda_sw to 0")


def test_a_default_that_contradicts_a_given_key_is_named_as_left_out(monkeypatch: pytest.MonkeyPatch):
    """None does today: with another default of one key."""

    class Coupled(Config):
        lambda_sw: float = 0.25

    monkeypatch.setattr(chorus.config.load, "Config", Coupled)
    assert refusal("num_agents: 1").startswith("configs.yaml: key 'lambda_sw' (left out) is 0.25; ")


def test_one_agent_without_the_distance_is_accepted():
    assert load("num_agents: 1\nlambda_sw: 0").num_agents == 1


def test_a_weight_that_falls_before_it_has_risen_is_refused():
    message = refusal("lambda_sw_warmup_ratio: 0.75\nlambda_sw_decay_ratio: 0.5")
    assert message.startswith("configs.yaml: key 'lambda_sw_decay_ratio' (line 2) is 0.5; ")
    assert "with lambda_sw_warmup_ratio 0.75 it is above 1" in message
    assert load("lambda_sw_warmup_ratio: 0.75\nlambda_sw_decay_ratio: 0.25").lambda_sw_decay_ratio == 0.25


@pytest.mark.parametrize("setting", ["bootstrap: poisson", "per_agent_batches: true"])
def test_rows_that_differ_do_not_go_with_responsibilities(setting: str):
    message = refusal(f"lambda_sw: 0\nresponsibility_alpha: 0.5\n{setting}")
    assert message.startswith(f"configs.yaml: key '{setting.partition(':')[0]}' (line 3) is ")
    assert message.endswith("set responsibility_alpha to 1")
    assert load("lambda_sw: 0\nresponsibility_alpha: 0.5\nbootstrap: none").bootstrap == "none"


def test_batches_of_each_agents_own_need_an_order_and_nothing_that_compares_the_agents():
    message = refusal("per_agent_batches: true\nlambda_sw: 0.5")
    assert message.startswith("configs.yaml: key 'per_agent_batches' (line 1) is true; the distance compares")
    assert "set lambda_sw to 0" in message
    assert refusal("shuffle: false", "per_agent_batches=true", "lambda_sw=0").endswith("set shuffle to true")
    assert load("per_agent_batches: true\nlambda_sw: 0\nbootstrap: poisson").per_agent_batches


@pytest.mark.parametrize("key", ["compile", "cuda_graphs"])
def test_what_cannot_carry_dropout_is_refused_with_it_and_auto_is_not(key):
    message = refusal(f"{key}: true\nlora_dropout: 0.1")
    assert message.startswith(f"configs.yaml: key '{key}' (line 1) is true; ")
    assert message.endswith("lora_dropout is above 0; set it to auto")
    assert load(f"{key}: auto\nlora_dropout: 0.1").lora_dropout == 0.1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 0", "none"),
        ("use_gradient_checkpointing: true", "full"),
        ("use_gradient_checkpointing: false", "none"),
        ("gradient_checkpointing: selective", "selective"),
        ("gradient_checkpointing: full\nuse_gradient_checkpointing: true", "full"),
        ("gradient_checkpointing: none\nuse_gradient_checkpointing: false", "none"),
    ],
)
def test_both_spellings_say_what_is_computed_again(text: str, expected: str):
    assert load(text).recomputation == expected


@pytest.mark.parametrize(("said", "older"), [("none", "true"), ("selective", "true"), ("full", "false")])
def test_spellings_that_contradict_each_other_are_refused(said: str, older: str):
    message = refusal(f"gradient_checkpointing: {said}", f"use_gradient_checkpointing={older}")
    assert message.startswith(f"command line: key 'use_gradient_checkpointing' is {older}; ")
    assert message.endswith(f"is {said}; set one of them to null")
