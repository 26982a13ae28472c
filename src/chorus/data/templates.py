"""From the columns of a row to its text: prompt and completion
by `prompt_template` and `completion_template`."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self

from chorus.config.data import DataSettings
from chorus.data.files import listed
from chorus.errors import InputError

NOT_TEXT = re.compile(
    "[\0\ud800-\udfff]"
)  # NUL, or half of a surrogate pair: no tokenizer can encode the latter
Form = Literal["chat", "template", "plain"]  # in which a question is asked
FORMS: tuple[Form, ...] = ("chat", "template", "plain")


class Problem(NamedTuple):
    """A row as text: what the model is given, and what it should answer.

    Attributes:
        learnt: (start, stop) of the characters of `prompt + completion + rest` that carry loss; empty for
            plain text, of which that is the completion and the end token.
        rest: turns after the last one that carries loss.
    """

    prompt: str
    completion: str
    learnt: tuple[tuple[int, int], ...] = ()
    rest: str = ""

    @property
    def text(self) -> str:
        return self.prompt + self.completion + self.rest


class BadRow(ValueError):
    """A row that cannot be used. The message says why, without the row's place."""


def template_fields(*templates: str) -> list[str]:
    """The field names of templates such as `Question: {question}`, each once; the configuration holds plain
    names only.

    >>> template_fields("{question} {{braces}}", "{answer} to {question}")
    ['question', 'answer']
    """
    parts = [part for template in templates for part in string.Formatter().parse(template)]
    return list(dict.fromkeys(name for _, name, _, _ in parts if name is not None))


def text_of(row: Mapping[str, Any], column: str, is_optional: bool = False) -> str:
    """The text of a column; a whole number is written out. An optional column may be empty, null or missing.

    Raises:
        BadRow: there is no text.
    """
    value = row.get(column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if is_optional and (value is None or value in ("", [], {})):
        return ""
    if column not in row:
        raise BadRow(f"field {column!r} is missing (the row has {listed(row)})")
    if value is None:
        raise BadRow(f"field {column!r} is null")
    if isinstance(value, float | bool):  # its text would be ambiguous: 0.10, 1e-1, yes?
        kind = type(value).__name__
        raise BadRow(f"field {column!r} must be text or a whole number, is {kind} ({value})")
    if not isinstance(value, str):
        raise BadRow(f"field {column!r} must be text or a whole number, is {type(value).__name__}")
    if not value.strip() and not is_optional:
        raise BadRow(f"field {column!r} is empty")
    if found := NOT_TEXT.search(value):
        raise BadRow(f"field {column!r} holds the character U+{ord(found.group()):04X}, which is not text")
    return value


@dataclass
class TextForm:
    """Rows whose text the templates make.

    Attributes:
        columns: those that the templates name.
        optional: those of them that may be empty.
        columns_of_each: the prompt's, and the completion's.
        absent, empty: in how many rows an optional column was missing altogether, or had no text.
    """

    prompt_template: str
    completion_template: str
    columns: list[str]
    optional: list[str]
    columns_of_each: list[list[str]]
    absent: Counter[str] = field(default_factory=Counter)
    empty: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, settings: DataSettings) -> Self:
        templates = settings.prompt_template, settings.completion_template
        columns = template_fields(*templates)
        optional = [column for column in columns if column in settings.optional_columns]
        return cls(*templates, columns, optional, [template_fields(template) for template in templates])

    def write(self, row: Mapping[str, Any]) -> Problem:
        """The row's prompt and completion.

        Raises:
            BadRow: a needed column, or every column of one of the templates, has no text.
        """
        texts = {column: text_of(row, column, column in self.optional) for column in self.columns}
        for column in self.optional:
            self.absent[column] += column not in row
            self.empty[column] += not texts[column]
        problem = Problem(self.prompt_template.format_map(texts), self.completion_template.format_map(texts))
        for names in self.columns_of_each:
            if names and not any(texts[name].strip() for name in names):
                raise BadRow(f"{'field' if len(names) == 1 else 'every one of'} {listed(names)} is empty")
        return problem

    def is_whole_without_some(self, row: Mapping[str, Any]) -> bool:
        """Whether the row could be used if its columns without text were optional."""
        try:
            replace(self, optional=self.columns, absent=Counter(), empty=Counter()).write(row)
        except BadRow:
            return False
        return True

    def refuse_absent(self, source: str, num_rows: int) -> None:
        """Refuse an optional column that no row has: it is misspelt."""
        for column, count in self.absent.items():
            if count == num_rows:
                raise InputError(
                    f"{source}: no row has the column {column!r}; correct prompt_template and "
                    "completion_template"
                )


def is_text(row: Mapping[str, Any], columns: Iterable[str]) -> bool:
    """Whether the row has these columns, and none of them holds turns or other structures."""
    return all(column in row and not isinstance(row[column], list | dict) for column in columns)
