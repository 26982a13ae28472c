"""From a user's question to the tokens of a prompt, in the form in which the agents were trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chorus.config.data import DataSettings
from chorus.data.chat import ChatForm, Turn
from chorus.data.templates import BadRow, Form, Problem, template_fields, text_of
from chorus.data.tokenise import Encoder, end_ids
from chorus.ensemble.load import Ensemble
from chorus.errors import InputError


@dataclass(frozen=True)
class PromptForm:
    """How questions become prompts.

    Attributes:
        form: chat renders turns by a chat template; template fills the run's prompt_template; plain takes
            the text as it is.
        template: of form `template`.
        chat: of form `chat`.
        end_ids: tokens that end an answer.
    """

    form: Form
    template: str
    optional: frozenset[str]
    encoder: Encoder
    chat: ChatForm | None
    end_ids: frozenset[int]

    def ask(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens of a conversation that ends with the user's turn; at least one.

        Only a chat template takes earlier turns: other forms ask the last one alone.

        Raises:
            InputError: an empty question, or turns that the template refuses.
        """
        question = turns[-1]["content"] if turns else ""
        if not question.strip():
            raise InputError("the prompt is empty; write a question")
        try:
            if self.chat is not None:
                return self._tokens(_chat_problem(self.chat.prompt(turns)))
            text = question if self.form == "plain" else self._filled(question)
        except BadRow as error:
            raise InputError(f"the prompt cannot be asked: {error}; ask it otherwise") from None
        return self.plain(text)

    def plain(self, text: str) -> list[int]:
        """The tokens of a text as it is; at least one.

        Raises:
            InputError: it holds a token that the base cannot read.
        """
        return self._tokens(Problem(text, ""))

    def _tokens(self, problem: Problem) -> list[int]:
        try:
            self.encoder.check(problem)
        except BadRow as error:
            raise InputError(f"the prompt cannot be asked: {error}; ask it otherwise") from None
        return self.encoder.prompt(problem)

    def _filled(self, question: str) -> str:
        columns = template_fields(self.template)
        needed = [column for column in columns if column not in self.optional] or columns[:1]
        row = {needed[0]: question} if len(needed) == 1 else _columns_of(question, needed)
        texts = {column: text_of(row, column, column in self.optional) for column in columns}
        return self.template.format_map(texts)


def _chat_problem(text: str) -> Problem:
    """A rendered chat, to which the tokenizer adds no special tokens."""
    return Problem(text, "", learnt=((len(text), len(text)),))


def _columns_of(question: str, needed: Sequence[str]) -> Mapping[str, Any]:
    try:
        row = json.loads(question)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        example = json.dumps(dict.fromkeys(needed, "..."))
        raise InputError(
            f"the run's prompt_template has {len(needed)} columns; ask with an object, {example}"
        )
    return row


def prompt_form(ensemble: Ensemble, wanted: Form | None = None) -> PromptForm:
    """The form in which the ensemble was trained, or the one that is wanted.

    Adapters without a run, of which nothing is known, get the base's chat template where it has one.

    Raises:
        InputError: a form that the ensemble does not have.
    """
    config = ensemble.description.get("config")
    known = {key: value for key, value in (config or {}).items() if key in DataSettings.model_fields}
    settings = DataSettings.model_validate(known)
    tokenizer = ensemble.tokenizer
    form = wanted
    if form is None and config:
        form = "chat" if _is_of_turns(ensemble.description, settings) else "template"
    elif form is None:
        form = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    if form == "template" and not config:
        raise InputError(
            f"{', '.join(ensemble.names)}: have no run's prompt_template; ask in another form, chat or plain"
        )
    chat = ChatForm.of("messages", settings, tokenizer) if form == "chat" else None
    ends = frozenset(end_ids(tokenizer, chat))
    template, optional = settings.prompt_template, frozenset(settings.optional_columns)
    return PromptForm(form, template, optional, Encoder(tokenizer), chat, ends)


def _is_of_turns(description: Mapping[str, Any], settings: DataSettings) -> bool:
    """Whether the run's rows were turns. Runs of earlier versions do not say so."""
    rows = description.get("row_form")
    if isinstance(rows, str):
        return rows != "text"
    return settings.row_format == "chat" or settings.dataset_name == "arithmetic_chat"
