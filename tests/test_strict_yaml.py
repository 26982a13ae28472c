"""Strict YAML on its own; test_config.py has what a user meets of it."""

from pathlib import Path

import pytest

from chorus.errors import InputError
from chorus.strict_yaml import as_yaml, settings_of_command_line, settings_of_file


def values_of(text: str, folder: Path) -> dict[str, object]:
    (folder / "a.yaml").write_text(text)
    return {key: setting.value for key, setting in settings_of_file(str(folder / "a.yaml")).items()}


def test_it_is_yaml_1_2(tmp_path: Path):
    assert values_of("a: 3e-5\nb: no\nc: on\nd: 0o17\ne: 017\nf: null", tmp_path) == {
        "a": 3e-5,
        "b": "no",
        "c": "on",
        "d": 15,
        "e": 17,
        "f": None,
    }


def test_a_value_keeps_how_it_was_written_and_where(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("# first\nlr: 3.0e-05  # small\n")
    setting = settings_of_file(str(tmp_path / "a.yaml"))["lr"]
    assert (setting.value, setting.written) == (3e-5, "3.0e-05")
    assert setting.place == f"{tmp_path}/a.yaml: key 'lr' (line 2)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "duplicate"),
        ("\ufeffa: 1", "byte order mark"),
        ("a:\n\tb: 1", "tab"),
        ("", "is empty"),
        ("- a", "has no `key: value` lines"),
        ("[a]: 1", "not a plain word"),
        ("a: !!python/object/apply:os.system [true]", "not plain YAML"),
        ("a: [1", "not plain YAML"),
    ],
)
def test_what_is_not_plain_is_refused_in_one_line_with_the_place(text: str, words: str, tmp_path: Path):
    with pytest.raises(InputError) as refused:
        values_of(text, tmp_path)
    message = str(refused.value)
    assert words in message.replace("\\t", "tab")
    assert message.startswith(f"{tmp_path}/a.yaml")
    assert "\n" not in message


def test_the_command_line_reads_values_as_the_file_does():
    settings = settings_of_command_line(["a=3e-5", "b=[x, y]", "c=", "d=k=v"])
    assert {key: setting.value for key, setting in settings.items()} == {
        "a": 3e-5,
        "b": ["x", "y"],
        "c": None,
        "d": "k=v",
    }
    for arguments, words in ((["a"], "key=value"), (["a=1", "a=2"], "duplicate")):
        with pytest.raises(InputError, match=words):
            settings_of_command_line(arguments)


@pytest.mark.parametrize(
    "value", ["a", "no", "null", "1", "", " a", "a: b", "[?a]", "\x85", "é\n", 3e-5, None, True, ["a", "?b"]]
)
def test_what_is_written_is_read_back_equal(value: object, tmp_path: Path):
    assert values_of(f"key: {as_yaml(value)}", tmp_path) == {"key": value}
