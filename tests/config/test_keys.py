"""Every key of the configuration: what it accepts, and in which words it refuses the rest.

What a key accepts is read from its own field, as JSON schema, and judged by the `jsonschema` package.
"""

import random
import re
from contextlib import suppress

import pytest
from key_values import ODDITIES, edges, has_a_rule_of_its_own, is_valid, other_value, parsed
from loading import load, refusal

from chorus.config import Config, render
from chorus.config.keys import is_nullable, is_text
from chorus.config.strict_yaml import as_yaml
from chorus.errors import InputError

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
SAMPLE = 20


def written_values(key: str) -> list[str]:
    """As written in YAML: all that is near a limit or a word of
    the key, and a sample of what is wrong anywhere."""
    odd = random.Random(key).sample(ODDITIES, SAMPLE)
    return [*dict.fromkeys([*edges(key), as_yaml(other_value(key)), *odd])]


def accepted(key: str, written: str) -> Config | None:
    """The configuration with this value, which the schema
    allows; None where a validator of its own refuses it."""
    with suppress(InputError):
        return load(f"{key}: {written}")
    named = re.search(r"key '(\w+)'", refusal(f"{key}: {written}"))
    assert named
    assert has_a_rule_of_its_own(named[1]), written
    return None


@pytest.mark.parametrize("key", Config.model_fields)
def test_a_key_accepts_what_its_field_allows_and_refuses_the_rest_with_place_value_and_remedy(key: str):
    verdicts = set()
    for written in written_values(key):
        if is_valid(key, parsed(written)):
            config = accepted(key, written)
            if config is None:
                continue
            verdicts.add(True)
            if not is_text(key):
                assert load("seed: 0", f"{key}={written}").model_dump()[key] == config.model_dump()[key], (
                    written
                )
        else:
            verdicts.add(False)
            message = refusal(f"# a comment\n{key}: {written}")
            assert message.startswith(f"configs.yaml: key '{key}' (line 2) is {written}; "), message
            if not is_text(key):
                expected = message.replace("configs.yaml", "command line").replace(" (line 2)", "")
                assert refusal("epochs: 1", f"{key}={written}") == expected
    assert verdicts == {True, False}


def test_a_configuration_that_differs_from_the_defaults_in_every_key_is_read_back_from_what_is_printed():
    config = Config().model_copy(update={key: other_value(key) for key in Config.model_fields})
    assert parsed(render(config)) == config.model_dump()


@pytest.mark.parametrize("key", [key for key in Config.model_fields if is_text(key)])
def test_a_text_on_the_command_line_means_what_it_says(key: str):
    for said in ("Query: {a}", " {a} #2 ", "[{a}]", "a={a}", "true {a}", "'{a}' or \"b{a}"):
        assert getattr(load("seed: 0", f"{key}={said}"), key) == said
    for said in ('"\\tQ: {a}\\n"', "'\tQ: {a}'"):
        assert getattr(load("seed: 0", f"{key}={said}"), key) == parsed(said)
    assert "is not one quoted text; " in refusal("seed: 0", f'{key}="a" or "{{a}}"')
    if is_nullable(key):
        assert getattr(load("seed: 0", f"{key}=null"), key) is None
        assert getattr(load("seed: 0", f'{key}="null"'), key) == "null"


@pytest.mark.parametrize("key", Config.model_fields)
def test_a_misspelt_key_is_refused_with_the_nearest_one(key):
    for misspelt in (f"{key}x", key[:-1]):
        expected = f" is not known; did you mean '{key}'?"
        assert refusal(f"# a comment\n{misspelt}: 1") == f"configs.yaml: key '{misspelt}' (line 2){expected}"
        assert refusal("epochs: 1", f"{misspelt}=1") == f"command line: key '{misspelt}'{expected}"


@pytest.mark.parametrize("key", Config.model_fields)
def test_a_duplicate_key_in_a_file_is_refused_at_its_second_line(key):
    in_file = refusal(f"{key}: 1\n# a comment\n{key}: 1\n")
    assert in_file.startswith(f"configs.yaml: key '{key}' (line 3) is a duplicate")
