"""Responses in OpenAI's format, whole or as a stream of events."""

import json
import time
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import uuid4

from chorus.ensemble.texts import Text
from chorus.serving.protocol import (
    FINISH,
    ChatRequest,
    CompletionRequest,
    Request,
    chat_logprobs,
    completion_logprobs,
    uncertainty_object,
    usage_object,
)
from chorus.serving.scheduler import Score
from chorus.serving.watched import Delta


class Echo(NamedTuple):
    """A prompt to echo, and the text of each of its tokens."""

    text: str
    pieces: list[str]


@dataclass(frozen=True)
class Asked:
    """A validated request.

    Attributes:
        prompts: token ids; text number t is an answer to prompt t // n.
        echoes: the prompts' texts, if they are to be echoed.
    """

    request: Request
    prompts: list[list[int]]
    texts: list[Text]
    scores: list[Score]
    echoes: list[Echo]
    has_tokens: bool

    @property
    def usage(self) -> dict[str, int]:
        return usage_object(sum(map(len, self.prompts)), self.texts)


def event_of(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def about(asked: Asked, kind: str = "") -> dict[str, Any]:
    """The first fields of every response and every event."""
    is_chat = isinstance(asked.request, ChatRequest)
    name = "chat.completion" + (f".{kind}" if kind else "") if is_chat else "text_completion"
    prefix = "chatcmpl" if is_chat else "cmpl"
    return {
        "id": f"{prefix}-{uuid4().hex}",
        "object": name,
        "created": int(time.time()),
        "model": asked.request.model,
    }


def chunk_of(asked: Asked, delta: Delta) -> dict[str, Any]:
    """One choice of an event."""
    text = asked.texts[delta.place]
    choice: dict[str, Any] = {"index": delta.place, "finish_reason": None}
    if isinstance(asked.request, ChatRequest):
        choice["delta"] = {"content": delta.content}
        logprobs = chat_logprobs(text, delta.pieces, delta.first) if asked.has_tokens else None
    else:
        choice["text"] = delta.content
        logprobs = None
        if asked.has_tokens:
            logprobs = completion_logprobs(text, delta.pieces, delta.first, delta.offset)
    choice["logprobs"] = logprobs
    if delta.is_last:
        choice["finish_reason"] = FINISH[text.answer.ended]
        choice["uncertainty"] = uncertainty_object(text)
    return choice


def whole(asked: Asked) -> dict[str, Any]:
    """The response to a request that is not streamed."""
    request = asked.request
    if isinstance(request, CompletionRequest):
        choices = _completion_choices(asked, request)
    else:
        choices = [_chat_choice(asked, index, text) for index, text in enumerate(asked.texts)]
    return {**about(asked), "choices": choices, "usage": asked.usage}


def _chat_choice(asked: Asked, index: int, text: Text) -> dict[str, Any]:
    pieces = text.ending.pieces(text.answer) if asked.has_tokens else []
    return {
        "index": index,
        "message": {"role": "assistant", "content": text.answer.text, "refusal": None},
        "logprobs": chat_logprobs(text, pieces, 0) if asked.has_tokens else None,
        "finish_reason": FINISH[text.answer.ended],
        "uncertainty": uncertainty_object(text),
    }


def _completion_choices(asked: Asked, request: CompletionRequest) -> list[dict[str, Any]]:
    n = request.n or 1
    choices = []
    for index in range(n * len(asked.prompts)):
        text = asked.texts[index] if asked.texts else None
        echo = asked.echoes[index // n].text if asked.echoes else ""
        logprobs = None
        if text is not None and asked.has_tokens:
            logprobs = completion_logprobs(text, text.ending.pieces(text.answer), 0, len(echo))
        if asked.scores:
            logprobs = _with_echo(asked, index // n, logprobs)
        choices.append(
            {
                "index": index,
                "text": echo + (text.answer.text if text is not None else ""),
                "logprobs": logprobs,
                "finish_reason": "length" if text is None else FINISH[text.answer.ended],
                "uncertainty": None if text is None else uncertainty_object(text),
            }
        )
    return choices


def _with_echo(asked: Asked, place: int, own: dict[str, Any] | None) -> dict[str, Any]:
    """The prompt's tokens before those of the answer. The first one has no probability."""
    pieces, log_probs = asked.echoes[place].pieces, [None, *asked.scores[place].log_probs]
    starts = [sum(map(len, pieces[:number])) for number in range(len(pieces))]
    tops = [
        None if log_prob is None else {piece: log_prob}
        for piece, log_prob in zip(pieces, log_probs, strict=True)
    ]
    more = own or {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    return {
        "tokens": pieces + more["tokens"],
        "token_logprobs": log_probs + more["token_logprobs"],
        "top_logprobs": tops + (more["top_logprobs"] or [{}] * len(more["tokens"])),
        "text_offset": starts + more["text_offset"],
    }
