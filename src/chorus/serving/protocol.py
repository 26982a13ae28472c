"""OpenAI's requests and responses, as far as an ensemble supports them.

Unsupported fields that would change an answer are refused; fields without effect are accepted and ignored.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from chorus.ensemble.texts import Text
from chorus.ensemble.uncertainty import uncertainty_of

MOST_TOPS = 20  # of the most probable tokens for each token, OpenAI's limit
FINISH = {"end": "stop", "stop": "stop", "length": "length"}
TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # free-form, from the client; without effect


class Request(BaseModel):
    """Fields of both kinds of requests."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    @field_validator("stop")
    @classmethod
    def _are_texts(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if "" in stops or len(stops) > 4:
            raise ValueError("give one to four texts, none of them empty")
        return stop

    @field_validator("presence_penalty", "frequency_penalty", "logit_bias")
    @classmethod
    def _are_off(cls, value: float | dict[str, float] | None) -> float | dict[str, float] | None:
        if value:
            raise ValueError("is not supported; leave it out")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Request):
    """Of /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOPS)] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported; ask for n answers")
        if self.echo and self.stream:
            raise ValueError("echo cannot be streamed; leave out stream")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which asks for nothing without echo")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts or token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        parts = content if isinstance(content, list) else []
        if any(isinstance(part, dict) and part.get("type") != "text" for part in parts):
            raise ValueError("only parts of type text are supported; leave the others out")
        return content

    def as_turn(self) -> dict[str, str]:
        """The turn, as chat templates take it."""
        content = self.content
        return {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }


class ChatRequest(Request):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOPS)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.messages[-1].role != "user":
            raise ValueError("the last message must be the user's")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be at least 1")
        return self


def error_object(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """OpenAI's error format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def uncertainty_object(text: Text) -> dict[str, Any]:
    """An answer's uncertainty; see `uncertainty.AnswerUncertainty`."""
    return uncertainty_of(text.answer)._asdict()


def usage_object(prompt_tokens: int, texts: Sequence[Text]) -> dict[str, int]:
    """Token counts: prompts, each once, and answers."""
    written = sum(len(text.answer.token_ids) for text in texts)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
    }


def completion_logprobs(text: Text, pieces: Sequence[str], first: int, offset: int) -> dict[str, Any]:
    """The format of /v1/completions, for the tokens from `first` on.

    Args:
        pieces: what each of these tokens adds to the text.
        offset: of the first one's characters.
    """
    answer, offsets = text.answer, []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    tops = answer.tops[first : first + len(pieces)]
    return {
        "tokens": list(pieces),
        "token_logprobs": answer.log_probs[first : first + len(pieces)],
        "top_logprobs": [_by_text(text, own) for own in tops] if text.num_tops else None,
        "text_offset": offsets,
    }


def chat_logprobs(text: Text, pieces: Sequence[str], first: int) -> dict[str, Any]:
    """The same in the format of /v1/chat/completions."""
    content = []
    for number, piece in enumerate(pieces, start=first):
        tops = text.answer.tops[number] if text.num_tops else []
        named = [_chat_token(_word(text, token), log_prob) for token, log_prob in tops]
        content.append({**_chat_token(piece, text.answer.log_probs[number]), "top_logprobs": named})
    return {"content": content, "refusal": None}


def _chat_token(piece: str, log_prob: float) -> dict[str, Any]:
    return {"token": piece, "logprob": log_prob, "bytes": list(piece.encode())}


def _by_text(text: Text, tops: Sequence[tuple[int, float]]) -> dict[str, float]:
    """The most probable one among tokens with equal text."""
    return {_word(text, token): log_prob for token, log_prob in reversed(tops)}


def _word(text: Text, token: int) -> str:
    tokenizer = text.ending.tokenizer
    assert tokenizer is not None
    return str(tokenizer.decode([token], skip_special_tokens=False))
