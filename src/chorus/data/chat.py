"""Rows of turns: read from common formats, rendered by a chat template, with loss on the assistant's turns.

The assistant's characters are found in two ways. A template may mark them with `{% generation %}`
(transformers' chat templates). Otherwise a turn begins where the earlier turns, rendered with the generation
prompt, end, and it ends where the turns up to it end. If both are available they must agree, except for white
space.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from chorus.config.data import DataSettings
from chorus.data.files import listed
from chorus.data.templates import NOT_TEXT, BadRow, Problem, TextForm, is_text, text_of
from chorus.errors import InputError

Kind = Literal["messages", "conversations", "prompt and completion", "instruction", "templates"]
Turn = dict[str, Any]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES |= {
    "chatgpt": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
}
ROLES |= {"function_response": "tool", "observation": "tool", "ipython": "tool"}
ANSWERS = ("output", "response")  # the column beside `instruction`, as in Alpaca and in Dolly
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
BESIDE = ("tools", "system")  # columns that go with turns


def kind_of_row(row: Mapping[str, Any], settings: DataSettings) -> Kind | None:
    """How the row holds turns; None for plain text or an unknown format.

    Plain columns become turns only where `row_format` says so, or where the templates' columns are missing.
    """
    form = TextForm.of(settings)
    fits = is_text(row, set(form.columns) - set(form.optional))
    if settings.row_format == "text" or (settings.row_format == "auto" and fits):
        return None
    for key in ("messages", "conversations"):
        if _is_turns(row.get(key)):
            return key
    if _is_turns(row.get("prompt")) and _is_turns(row.get("completion")):
        return "prompt and completion"
    if settings.row_format == "chat" and fits:
        return "templates"
    if "instruction" in row and any(answer in row for answer in ANSWERS):
        return "instruction"
    return None


def _is_turns(value: object) -> bool:
    """A list of objects, or the JSON text of one, as a CSV cell holds it."""
    if isinstance(value, str):
        return value.lstrip().startswith("[{")
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


@dataclass
class ChatForm:
    """Rows of turns, and the template that renders them.

    Attributes:
        kind: how the rows hold turns.
        plain: the templates that make turns from plain columns.
        columns, optional: the columns that are read, and those of them that a table may lack.
    """

    kind: Kind
    plain: TextForm
    columns: list[str]
    optional: list[str]
    template: str
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, kind: Kind, settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> "ChatForm":
        """Raises InputError where there is no chat template."""
        plain, template = TextForm.of(settings), chat_template_of(settings, tokenizer)
        optional: list[str] = [*BESIDE]
        if kind == "templates":
            columns, optional = plain.columns, [*plain.optional, *BESIDE]
        elif kind == "instruction":
            columns, optional = ["instruction"], ["input", "context", *ANSWERS, *BESIDE]
        else:
            columns = kind.split(" and ")
        return cls(kind, plain, [*dict.fromkeys([*columns, *optional])], optional, template, tokenizer)

    def write(self, row: Mapping[str, Any]) -> Problem:
        """The rendered turns; the assistant's last turn is the completion.

        Raises:
            BadRow: no turns, turns that are not well formed, or that the template refuses.
            InputError: the template does not tell what the assistant wrote.
        """
        turns, first_learnt = self._turns_of(row)
        system = row.get("system")
        if isinstance(system, str) and system.strip() and turns[0]["role"] not in ("system", "developer"):
            turns, first_learnt = [{"role": "system", "content": system}, *turns], first_learnt + 1
        tools = _tools_of(row)
        learnt = [
            place
            for place, turn in enumerate(turns)
            if turn["role"] == "assistant" and place >= first_learnt and turn.get("weight") != 0
        ]
        if not learnt:
            raise BadRow("no turn of the assistant's is to be learnt")
        return self._problem([self._as_rendered(turn) for turn in turns], tools, learnt)

    def _as_rendered(self, turn: Turn) -> Turn:
        """The turn without its weight and without an end token in its text: the template writes one."""
        turn, end = {key: value for key, value in turn.items() if key != "weight"}, self.tokenizer.eos_token
        if turn["role"] == "assistant" and end and turn["content"].rstrip().endswith(end):
            turn["content"] = turn["content"].rstrip().removesuffix(cast(str, end))
        return turn

    def write_turns(self, turns: Sequence[Turn]) -> Problem:
        """As `write`, for well-formed turns, with loss on every turn of the assistant."""
        return self._problem(
            turns, None, [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        )

    def _problem(self, turns: Sequence[Turn], tools: list[Any] | None, learnt: Sequence[int]) -> Problem:
        text, marked = self._render(turns, tools)
        spans = self._spans_by_prefixes(turns, tools, text)
        if spans is not None:
            chosen = [spans[place] for place in learnt]
            if marked is not None:
                self._refuse_disagreement(text, list(spans.values()), marked)
                inside = [[one for one in marked if start <= one[0] < stop] for start, stop in chosen]
                chosen = [one for some in inside for one in some]
            begin = spans[learnt[-1]][0]
        elif marked is not None and len(marked) == sum(turn["role"] == "assistant" for turn in turns):
            order = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
            chosen = [marked[order.index(place)] for place in learnt]
            begin = chosen[-1][0]
        else:
            raise InputError(
                "key 'chat_template': the template renders a turn otherwise once others follow it, and "
                "does not mark the assistant's words; give a file whose template has {% generation %} "
                "around them"
            )
        end = chosen[-1][1]
        return Problem(text[:begin], text[begin:end], tuple(chosen), text[end:])

    def _spans_by_prefixes(
        self, turns: Sequence[Turn], tools: list[Any] | None, text: str
    ) -> dict[int, tuple[int, int]] | None:
        """The span of each of the assistant's turns in the text; None where a prefix renders differently."""
        spans = {}
        for place, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self._render(turns[:place], tools, asks=True)[0]
                through = text if place + 1 == len(turns) else self._render(turns[: place + 1], tools)[0]
                if not (text.startswith(through) and through.startswith(before)):
                    return None
                spans[place] = (len(before), len(through))
        return spans

    def _refuse_disagreement(
        self, text: str, spans: Sequence[tuple[int, int]], marked: Sequence[tuple[int, int]]
    ) -> None:
        of_turns = [text[start:stop].strip() for start, stop in spans]
        of_marks = [
            "".join(text[a:b] for a, b in marked if start <= a < stop).strip() for start, stop in spans
        ]
        outside = [text[a:b] for a, b in marked if not any(start <= a and b <= stop for start, stop in spans)]
        if of_turns != of_marks or outside:
            turn, mark = next(
                ((a, b) for a, b in zip(of_turns, of_marks, strict=True) if a != b), ("", outside[:1])
            )
            raise InputError(
                f"key 'chat_template': {{% generation %}} marks {mark!r}, where the assistant's turn is "
                f"{turn!r}; correct the template: the mark must hold the whole turn and the token that ends "
                "it"
            )

    def _render(
        self, turns: Sequence[Turn], tools: list[Any] | None, asks: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """The text, and the spans that the template marks as generated (None: no marks)."""
        has_marks = MARKS.search(self.template) is not None and not asks
        names: dict[str, Any] = dict(self.tokenizer.special_tokens_map)  # a template writes `bos_token`
        try:
            [text], marks = render_jinja_template(
                [list(turns)],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=has_marks,
                add_generation_prompt=asks,
                **names,
            )
        except TemplateSyntaxError as error:
            raise InputError(
                f"key 'chat_template': it is not valid Jinja ({error.message}, line {error.lineno}); "
                "correct it"
            ) from error
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRow(f"the chat template refuses it: {error}") from error
        if NOT_TEXT.search(text):
            raise BadRow("it holds a NUL character or half of a surrogate pair, which is not text")
        spans = cast(list[tuple[int, int]], marks[0]) if has_marks else []
        return text, [(start, stop) for start, stop in spans if stop > start] if has_marks else None

    def prompt(self, turns: Sequence[Turn], tools: list[Any] | None = None) -> str:
        """The prompt for the assistant's next turn.

        Raises:
            BadRow: the template refuses the turns.
        """
        return self._render(turns, tools, asks=True)[0]

    def _turns_of(self, row: Mapping[str, Any]) -> tuple[list[Turn], int]:
        """The turns of a row, and the index of the first one that may be learnt."""
        if self.kind == "prompt and completion":
            prompt = _read_turns(row, "prompt")
            return prompt + _read_turns(row, "completion"), len(prompt)
        if self.kind == "templates":
            asked, answer, *_ = self.plain.write(row)
        elif self.kind == "instruction":
            asked, answer = _instruction(row)
        else:
            return _read_turns(row, self.kind), 0
        return [
            {"role": "user", "content": asked.strip()},
            {"role": "assistant", "content": answer.strip()},
        ], 0

    def refuse_absent(self, source: str, num_rows: int) -> None:
        """Refuse a column of the templates that no row has."""
        self.plain.refuse_absent(source, num_rows)


def _instruction(row: Mapping[str, Any]) -> tuple[str, str]:
    column = next((column for column in ANSWERS if column in row), ANSWERS[0])
    more = [text_of(row, one, is_optional=True) for one in ("input", "context")]
    asked = [text_of(row, "instruction"), *(text for text in more if text.strip())]
    return "\n\n".join(asked), text_of(row, column)


def _read_turns(row: Mapping[str, Any], column: str) -> list[Turn]:
    """The turns of a column as `{"role": ..., "content": ...}`; ShareGPT's `from` and `value` are renamed.

    Raises:
        BadRow: they are not well formed.
    """
    turns = row.get(column)
    if column not in row or turns is None:
        raise BadRow(f"field {column!r} is missing (the row has {listed(row)})")
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError:
            turns = None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow(f"field {column!r} must be a list of turns, each with role and content")
    return [_read_turn(turn, f"turn {number} of {column!r}") for number, turn in enumerate(turns, start=1)]


def _read_turn(turn: Mapping[str, Any], what: str) -> Turn:
    own = {key: value for key, value in turn.items() if value is not None and key not in ("from", "value")}
    role = turn.get("role") or turn.get("from")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if role not in ROLES:
        raise BadRow(f"{what} is of {role!r}; a role is one of {listed(ROLES)}")
    if isinstance(content, list):  # OpenAI's parts
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise BadRow(f"{what} holds a part that is not text")
        content = "".join(texts)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"{what} must have text as content, has {type(content).__name__}")
    if ROLES[role] == "assistant" and not content.strip() and not turn.get("tool_calls"):
        raise BadRow(f"{what}, the assistant's, is empty")
    return {**own, "role": ROLES[role], "content": content}


def _tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(f"field 'tools' is not valid JSON: {error}") from None
    if tools is not None and tools != "" and not isinstance(tools, list):
        raise BadRow("field 'tools' must be a list of JSON schemas")
    return tools or None


def chat_template_of(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template of `chat_template`, or the tokenizer's own.

    Raises:
        InputError: the file cannot be read, or neither is there.
    """
    if settings.chat_template is not None:
        try:
            return Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"key 'chat_template': cannot read {settings.chat_template}: {error}; name a Jinja file"
            ) from error
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise InputError(
            "key 'chat_template': the rows hold turns, and the base's tokenizer has no chat template; name "
            "a Jinja file, take an instruction-tuned base, or flatten the turns into columns for "
            "prompt_template"
        ) from None
