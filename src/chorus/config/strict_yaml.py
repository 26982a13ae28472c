"""YAML for configurations: strict, plain data only, with the location of every error.

YAML 1.2 by ruamel: `3e-5` is a number and `no` is a word. Duplicate keys, tags that name code and byte order
marks are errors. Every value keeps its source text and line, so that a later check can name them.
"""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

from ruamel.yaml import YAML, MappingNode, YAMLError

from chorus.errors import InputError


class Setting(NamedTuple):
    """One value with its source text and location, for error messages."""

    value: object
    written: str
    place: str


def settings_of_file(file: str) -> dict[str, Setting]:
    """The `key: value` lines of a file. Raises InputError for anything else."""
    try:
        text = Path(file).read_bytes().decode()
    except OSError as error:
        refuse(f"{file}:", f"cannot be read ({error.strerror}); name the configuration with --config FILE")
    except UnicodeDecodeError:
        refuse(f"{file}:", "is not UTF-8 text; save it as UTF-8")
    if text.startswith("\ufeff"):
        refuse(f"{file}: line 1", "starts with a byte order mark; save it as UTF-8 without one")

    yaml = _yaml()
    with _yaml_errors_refused(f"{file}:"):
        root = yaml.compose(text)
    if not isinstance(root, MappingNode):
        found = "is empty" if root is None else "has no `key: value` lines"
        refuse(f"{file}:", f"{found}; `python -m chorus.config --defaults` prints a complete one")
    settings: dict[str, Setting] = {}
    for key_node, value_node in root.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if key_node.tag != "tag:yaml.org,2002:str":
            refuse(f"{file}: line {line}", "has a key that is not a plain word; write `key: value`")
        place = f"{file}: key {key!r} (line {line})"
        if key in settings:
            refuse(place, "is a duplicate of an earlier line; keep one of them")
        with _yaml_errors_refused(place):
            value = yaml.constructor.construct_object(value_node, deep=True)
        settings[key] = Setting(value, text[value_node.start_mark.index : value_node.end_mark.index], place)
    return settings


def settings_of_command_line(
    arguments: Sequence[str], text_keys: Collection[str] = (), nullable_keys: Collection[str] = ()
) -> dict[str, Setting]:
    """The `key=value` arguments. Of two with the same key, the later one holds.

    A value is read as YAML. That of a text key is the text itself, so that it may hold `: ` or ` #`; quotes
    around all of it are YAML's, and in double quotes so are escapes.

    Args:
        text_keys: keys whose values are text.
        nullable_keys: those of them that `null` turns off.

    Raises:
        InputError: an argument is not `key=value`, or its value cannot be read.
    """
    settings: dict[str, Setting] = {}
    for argument in arguments:
        key, equals, written = argument.partition("=")
        if not equals:
            refuse(
                f"command line: {argument!r}", "is not of the form key=value; write, for example, lr=0.001"
            )
        place = f"command line: key {key!r}"
        if key in text_keys and not (key in nullable_keys and written in ("null", "")):
            value: object = _text(written, place)
        else:
            with _yaml_errors_refused(place):
                value = _yaml().load(written)
        settings[key] = Setting(value, written, place)
    return settings


def _text(written: str, place: str) -> str:
    """The text that a text key's value on the command line stands for."""
    quote = written[:1]
    if len(written) < 2 or quote not in ("'", '"') or written[-1] != quote:
        return written
    try:
        value = _yaml().load(written)
    except (YAMLError, ValueError, LookupError):
        value = None
    if not isinstance(value, str):
        refuse(
            place,
            f"is {written}; it is not one quoted text; double each \\ in it, or put the other kind of "
            "quotes around it",
        )
    return value


def _yaml() -> YAML:
    return YAML(
        typ="safe", pure=True
    )  # YAML 1.2, plain data: `no` is a word, a tag that names code is an error


def as_yaml(value: object) -> str:
    """A value on one line: words plain, the rest as JSON, a part of YAML (ruamel loses `[?a]`)."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, str) and re.fullmatch(r"[a-zA-Z/_][\w/.-]*", value) and _yaml().load(value) == value:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in quoted)


@contextmanager
def _yaml_errors_refused(place: str) -> Iterator[None]:
    try:
        yield
    except YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = f", line {mark.line + 1}" if mark else ""
        remedy = (
            "indent and separate with spaces" if "\\t" in str(problem) else "write plain `key: value` lines"
        )
        refuse(place, f"is not plain YAML ({problem}{line}); {remedy}")
    except (ValueError, LookupError, RecursionError) as error:  # such as a date that does not exist
        refuse(place, f"cannot be read ({error}); write a plain value")


def refuse(place: str, message: str) -> NoReturn:
    """Raise InputError with a message of one line, whatever text it quotes."""
    raise InputError(" ".join(f"{place} {message}".split())) from None
