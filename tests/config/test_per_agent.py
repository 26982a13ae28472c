"""Keys with a value for each agent."""

import json

import pytest
from loading import load, refusal

from chorus.config import Config, render
from chorus.config.per_agent import largest, of_agent

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
KEYS = ("lr", "weight_decay", "lora_alpha", "lora_dropout", "dropconnect_p", "lora_init_gain")


@pytest.mark.parametrize("key", KEYS)
def test_a_list_has_a_value_for_each_agent_in_a_file_and_on_the_command_line(key: str):
    written = "[0.5, 0.25, 0.5]"
    for config in (
        load(f"{key}: {written}\nnum_agents: 3"),
        load("num_agents: 2", "num_agents=3", f"{key}={written}"),
    ):
        assert getattr(config, key) == [0.5, 0.25, 0.5]
        assert [of_agent(getattr(config, key), agent) for agent in range(3)] == [0.5, 0.25, 0.5]
        assert largest(getattr(config, key)) == 0.5
        assert load(render(config)) == config
        assert Config.model_validate(json.loads(json.dumps(config.model_dump()))) == config


@pytest.mark.parametrize("key", KEYS)
def test_a_list_of_another_length_is_refused_with_key_length_and_number_of_agents(key: str):
    for written, length in (("[0.5, 0.25]", 2), ("[]", 0), ("[0.5, 0.5]", 2)):
        message = refusal(f"num_agents: 3\n{key}: {written}")
        assert f"key '{key}' (line 2) is {written}; its length is {length}, and num_agents is 3; " in message
    assert "its length is 2, and num_agents is 4" in refusal("seed: 0", f"{key}=[0.5, 0.25]")
    message = refusal("num_agents: auto", f"{key}=[0.5, 0.25]")
    assert message.endswith("num_agents is auto; set num_agents=2")


@pytest.mark.parametrize("key", KEYS)
def test_a_list_of_equal_values_is_the_number(key: str):
    number = load(f"{key}: 0.5")
    assert load(f"{key}: [0.5, 0.5, 0.5, 0.5]") == number
    assert of_agent(getattr(number, key), 3) == largest(getattr(number, key)) == 0.5


@pytest.mark.parametrize("key", KEYS)
def test_a_bad_value_of_one_agent_is_refused_as_a_bad_number_is(key: str):
    alone = refusal(f"{key}: -1")
    for written in ("[0.5, 0.25, -1, 0.5]", "[-1]"):
        assert refusal(f"{key}: {written}") == alone.replace("is -1;", f"is {written};")
    assert "a valid number" in refusal(f"{key}: [a, 1, 1, 1]")


def test_dropout_of_one_agent_is_dropout_to_keys_that_do_not_go_with_it():
    for key in ("compile", "cuda_graphs"):
        assert "lora_dropout is above 0" in refusal(f"lora_dropout: [0, 0, 0.1, 0]\n{key}: true")
    assert Config(lora_dropout=[0.0, 0.0, 0.1, 0.0]).drops_inputs
    assert not Config().drops_inputs


def test_a_gain_does_not_go_with_adapters_that_exist():
    for gain in ("2", "[1, 1, 1, 2]"):
        message = refusal(f"lora_init_gain: {gain}\ninit_adapters_from: runs/a")
        assert "set lora_init_gain to 1" in message
