"""The configuration of a run from `configs.yaml` and the command line, and back to commented YAML.

`python -m chorus.config [--config FILE] [key=value ...]` prints the configuration that a run would use;
`python -m chorus.config --defaults` prints the repository's `configs.yaml`.
"""

import argparse
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import NoReturn

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from chorus.config.foreign_names import FOREIGN_VALUES, Answer, answer
from chorus.config.keys import SECTIONS, Config, is_nullable, is_text
from chorus.config.strict_yaml import Setting, as_yaml, refuse, settings_of_command_line, settings_of_file

HEADER = """\
# The configuration of a run. A key that is left out takes its default. To set one for a single run:
# accelerate launch train.py lr=3e-5 'lora_target_modules=[q_proj, v_proj]'"""

ALL_KEYS = "`python -m chorus.config --defaults` prints every key with its meaning"


def load_config(arguments: Sequence[str]) -> Config:
    """The configuration of a run, from the command line's `[--config FILE] [key=value ...]`.

    FILE is `configs.yaml` in the working directory unless named. Raises InputError for every mistake in it.
    """
    return _resolve(_parser().parse_intermixed_args(arguments))


def config_over(entries: Mapping[str, object], arguments: Sequence[str], place: str) -> Config:
    """A saved configuration, overridden by `key=value` arguments. Keys unknown to this version are dropped.

    Args:
        entries: as `Config.model_dump` wrote them.
        place: where they come from, for errors.

    Raises:
        InputError: an argument or an entry is not a valid setting.
    """
    saved = {key: value for key, value in entries.items() if key in Config.model_fields}
    settings = {key: Setting(value, as_yaml(value), f"{place}: key {key!r}") for key, value in saved.items()}
    return _validated(settings | _given(arguments), place)


def render(config: Config) -> str:
    """The whole configuration as commented YAML. `load_config` reads an equal configuration from it."""
    lines = [HEADER]
    for section in SECTIONS:
        lines += ["", f"# ---- {section.TITLE} ".ljust(100, "-")]
        for key, field in section.model_fields.items():
            comment = textwrap.wrap(field.description or "", 100, initial_indent="# ", subsequent_indent="# ")
            lines += ["", *comment, f"{key}: {as_yaml(getattr(config, key))}"]
    return "\n".join(lines) + "\n"


def as_settings(values: Mapping[str, object]) -> str:
    """Keys and values as a command line takes them."""
    return shlex.join(f"{key}={as_yaml(value)}" for key, value in values.items())


def main(arguments: Sequence[str]) -> None:
    parser = _parser("python -m chorus.config")
    parser.add_argument(
        "--defaults", action="store_true", help="print the defaults instead, as in configs.yaml"
    )
    options = parser.parse_intermixed_args(arguments)
    print(render(Config() if options.defaults else _resolve(options)), end="")


def _parser(program: str | None = None) -> argparse.ArgumentParser:
    parser = _Parser(
        program,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The keys of a run, and what each one means, are in configs.yaml.",
        epilog="""examples:
  lr=3e-5 max_train_steps=null               numbers, true, false, null and words as in YAML
  'lora_target_modules=[q_proj, v_proj]'     a list
  'prompt_template=Question: {question} '    text as it stands, spaces and all
  'prompt_template="{question}\\n"'           text in quotes of its own, with \\n for a new line

Of two settings of one key the later one holds.

`python -m chorus.config`, with the same arguments, prints the configuration that a run would use.""",
    )
    parser.add_argument("--config", metavar="FILE", default="configs.yaml", help="default: configs.yaml")
    parser.add_argument(
        "settings", metavar="key=value", nargs="*", help="set a key for this run, over the file"
    )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse("command line:", f"{message}; --help shows what there is")


def _resolve(options: argparse.Namespace) -> Config:
    """The checked configuration: the command line overrides the file, the file the defaults."""
    return _validated(settings_of_file(options.config) | _given(options.settings), options.config)


def _given(arguments: Sequence[str]) -> dict[str, Setting]:
    """The `key=value` arguments; values of text keys are taken literally."""
    text_keys = [key for key in Config.model_fields if is_text(key)]
    return settings_of_command_line(arguments, text_keys, [key for key in text_keys if is_nullable(key)])


def _validated(settings: dict[str, Setting], file: str) -> Config:
    try:
        return Config.model_validate({key: setting.value for key, setting in settings.items()})
    except ValidationError as error:
        _refuse_the_first(error.errors(), settings, file)


def _refuse_the_first(errors: list[ErrorDetails], settings: dict[str, Setting], file: str) -> NoReturn:
    first = min(
        errors, key=lambda one: one["type"] != "extra_forbidden"
    )  # first: a misspelt key may cause the other errors
    key = str(first["loc"][0])
    if key not in settings:  # its default does not go with another key
        settings[key] = Setting(None, as_yaml(first["input"]), f"{file}: key {key!r} (left out)")
    _, written, place = settings[key]
    if first["type"] == "extra_forbidden":
        refuse(place, _unknown(key))
    given = f"is {textwrap.shorten(written, 80) or 'empty'}"
    if first["type"] == "value_error":  # raised by a validator of ours, with its own remedy
        refuse(place, f"{given}; {first['msg'].removeprefix('Value error, ')}")
    wanted = " or ".join(dict.fromkeys(one["msg"] for one in errors if one["loc"][0] == key)).replace(
        "Input", "it"
    )
    refuse(place, f"{given}; {wanted}{_remedy(key, written, wanted)}")


def _unknown(key: str) -> str:
    """The error text for an unknown key."""
    own = key.rpartition(".")[2].lower().replace("-", "_")
    foreign = Answer(own) if own in Config.model_fields else answer(key)
    if foreign is None:
        nearest = get_close_matches(key, Config.model_fields, n=1)
        return f"is not known; {f'did you mean {nearest[0]!r}?' if nearest else ALL_KEYS}"
    if foreign.key is None:
        return f"is not known; {foreign.note}"
    return f"is not known; here it is {foreign.key!r}{f' ({foreign.note})' if foreign.note else ''}"


def _remedy(key: str, written: str, wanted: str) -> str:
    """What to write instead, where pydantic's message does not say it."""
    foreign = FOREIGN_VALUES.get(key, {}).get(written.strip("'\"").lower())
    if foreign is not None:
        return f"; write {foreign}"
    remedies = {
        "a valid string": "; put it in quotes",
        "a valid list": f"; write [{written}]"
        if re.fullmatch(r"(?!null|true|false)[\w./-]+", written)
        else "; write [one, another]",
        "a valid boolean": "; write true or false, without quotes",
        "a valid integer": "; write a whole number, without quotes or a point",
        "a valid number": "; write a number, without quotes",
    }
    for kind, remedy in remedies.items():
        if kind in wanted:
            return remedy
    choices = get_close_matches(written, re.findall(r"'([\w-]+)'", wanted), n=1, cutoff=0.5)
    return f"; did you mean {choices[0]!r}?" if choices else ""
