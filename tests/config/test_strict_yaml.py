"""Strict YAML on its own; test_load.py has what a user meets of it."""

import re
from pathlib import Path

import pytest

from chorus.config.strict_yaml import as_yaml, settings_of_command_line, settings_of_file
from chorus.errors import InputError

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def values_of(text: str) -> dict[str, object]:
    Path("a.yaml").write_bytes(text.encode())
    return {key: setting.value for key, setting in settings_of_file("a.yaml").items()}


# ---- what is read ----


def test_it_is_yaml_1_2():
    assert values_of("a: 3e-5\nb: no\nc: on\nd: 0o17\ne: 017\nf: null") == {
        "a": 3e-5,
        "b": "no",
        "c": "on",
        "d": 15,
        "e": 17,
        "f": None,
    }


def test_a_value_keeps_how_it_was_written_and_where():
    Path("a.yaml").write_text("# first\nlr: 3.0e-05  # small\n")
    setting = settings_of_file("a.yaml")["lr"]
    assert (setting.value, setting.written) == (3e-5, "3.0e-05")
    assert setting.place == "a.yaml: key 'lr' (line 2)"


def test_the_command_line_reads_values_as_the_file_does():
    settings = settings_of_command_line(["a=3e-5", "b=[x, y]", "c=", "d=k=v"])
    assert {key: setting.value for key, setting in settings.items()} == {
        "a": 3e-5,
        "b": ["x", "y"],
        "c": None,
        "d": "k=v",
    }
    with pytest.raises(InputError, match="key=value"):
        settings_of_command_line(["a"])


def test_the_later_of_two_settings_on_the_command_line_holds():
    assert settings_of_command_line(["a=1", "b=2", "a=3"])["a"].value == 3


# ---- what is refused ----


def refusal(file: str) -> str:
    """The one line with which this file is refused, after a look that it has its place and its remedy."""
    with pytest.raises(InputError) as refused:
        settings_of_file(file)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    assert re.fullmatch(rf"{file}: .+; .{{3,}}", message), message
    return message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a.yaml: is empty; "),
        ("# only a comment\n", "a.yaml: is empty; "),
        ("- a\n", "a.yaml: has no `key: value` lines; "),
        ("a\n", "a.yaml: has no `key: value` lines; "),
        ("\ufeffa: 1\n", "a.yaml: line 1 starts with a byte order mark; "),
        ("a: 1\nb:\t1\n", "line 2); indent and separate with spaces"),
        ("a: 1\n\tb: 1\n", "line 2); indent and separate with spaces"),
        ("a:\n\tb: 1", "line 2); indent and separate with spaces"),
        ("a: 1\nb: [1\n", "is not plain YAML"),
        ("a: 1\nb: c: d\n", "line 2); "),
        ("a: 1\n---\nb: 1\n", "is not plain YAML"),
        ("a: 1\0", "is not plain YAML"),
        ("a: *other", "is not plain YAML"),
        ("a: !!python/object/apply:os.system [true]", "is not plain YAML"),
        ("a: " + "[" * 1500, "a.yaml: cannot be read"),
        ("a: " + "9" * 5000, "a.yaml: key 'a' (line 1) cannot be read"),
        ("a: 2020-13-45", "a.yaml: key 'a' (line 1) cannot be read"),
        ("a: 1\na: 2", "a.yaml: key 'a' (line 2) is a duplicate"),
        ("a: 1\n1: 2\n", "a.yaml: line 2 has a key that is not a plain word; "),
        ("a: 1\n[b]: 2\n", "a.yaml: line 2 has a key that is not a plain word; "),
        ("<<: {a: 1}", "a.yaml: line 1 has a key that is not a plain word; "),
    ],
)
def test_a_text_that_is_no_plain_yaml_mapping_is_refused(text: str, words: str):
    Path("a.yaml").write_bytes(text.encode())
    assert words in refusal("a.yaml")


def test_a_file_that_cannot_be_read_is_refused():
    Path("folder").mkdir()
    Path("latin.yaml").write_bytes("model_name: é".encode("latin-1"))
    for file, reason in [
        ("none.yaml", "No such file"),
        ("folder", "Is a directory"),
        ("latin.yaml", "UTF-8"),
    ]:
        assert reason in refusal(file)


# ---- what is written ----

NUMBERS = [5e-5, 1e-3, 1e16, 1e-300, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, 3.0, 3]
WORDS_OF_YAML = ["no", "null", "1", "3e-5", "true", "~", "=", ".inf", "...", "---", "2020-01-01", "0x1F", ""]
MARKS_OF_YAML = [
    *(
        "?a",
        "[?a]",
        "- a",
        "a: b",
        "a #b",
        "a, b]",
        "[a",
        "&a",
        "*a",
        "!a",
        "|",
        ">",
        "%a",
        "@a",
        "`a",
        '"',
        "'",
    ),
]
ODD_CHARACTERS = [
    *("\n", "a\tb", "a\r\nb", "\\", "\\x85", "\x85", "\u2028", "\ufeff", "\x00", "\x7f", "\xa0", "é中", "😀"),
]
TEXTS = ["a", " a", " a ", "a\n", "é\n", "word " * 60, *WORDS_OF_YAML, *MARKS_OF_YAML, *ODD_CHARACTERS]


@pytest.mark.parametrize("value", [*NUMBERS, *TEXTS, None, True])
def test_what_is_written_is_read_back_equal(value: object):
    read = values_of(f"one: {as_yaml(value)}\nseveral: {as_yaml([value, 'b', value])}\n")
    assert read == {"one": value, "several": [value, "b", value]}
    assert type(read["one"]) is type(value)


def test_words_are_written_without_quotes():
    assert as_yaml("org/gemma-2-2b") == "org/gemma-2-2b"
