"""The server's paths: OpenAI's protocol over an ensemble."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from chorus.ensemble.texts import Answer, Ending, Sampling, Text
from chorus.errors import InputError
from chorus.serving import responses
from chorus.serving.opened import Opened
from chorus.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Request,
    error_object,
)
from chorus.serving.responses import Asked, Echo
from chorus.serving.scheduler import Busy, Closing, Scheduler, Score
from chorus.serving.watched import Watched

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health")
MOST_BYTES = 8 * 2**20  # of a request; the longest prompt is far smaller
WRONG_KEY = "incorrect API key; send the server's as the header Authorization: Bearer KEY"
LOOK_S = 0.5  # between two checks whether the client of a whole answer is still connected


class Refusal(Exception):
    """A response to the client with a status other than 200."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **more: str) -> None:
        super().__init__(message)
        self.status, self.content = status, error_object(message, kind, **more)


def build_app(opened: Opened, scheduler: Scheduler, api_key: str | None) -> FastAPI:
    """The application. It closes the scheduler when it shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(scheduler.close)

    app = FastAPI(title="Chorus", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=api_key)
    _handle_errors(app)
    service = Service(opened, scheduler)
    created = int(time.time())

    @app.get("/health")
    async def health() -> JSONResponse:
        state = {"status": "ok" if scheduler.is_alive else "failed", **scheduler.counts()}
        return JSONResponse(state, status_code=200 if scheduler.is_alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [_model(name, created, opened) for name in opened.names]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        service.answerer(name)
        return _model(name, created, opened)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: HttpRequest) -> Any:
        return await service.answer(service.understand_completion(request), http)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: HttpRequest) -> Any:
        return await service.answer(service.understand_chat(request), http)

    return app


def _model(name: str, created: int, opened: Opened) -> dict[str, Any]:
    base = opened.ensemble.base_name
    return {"id": name, "object": "model", "created": created, "owned_by": "chorus", "root": base}


class Guard:
    """Rejects requests without the key, or that are too large."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app, self.api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refused(HttpRequest(scope), self.api_key) if scope["type"] == "http" else None
        await (self.app if refusal is None else refusal)(scope, receive, send)


def _refused(request: HttpRequest, api_key: str | None) -> JSONResponse | None:
    """The response to a request without the key, or that is too large."""
    if api_key is not None and request.url.path != "/health":
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.encode(), api_key.encode()):
            content = error_object(WRONG_KEY, "invalid_request_error", "invalid_api_key")
            return JSONResponse(content, 401)
    if request.method == "POST":
        length = request.headers.get("content-length", "")
        if not length.isdigit():
            return JSONResponse(error_object("send a Content-Length", "invalid_request_error"), 411)
        if int(length) > MOST_BYTES:
            message = f"the request has more than {MOST_BYTES} bytes"
            return JSONResponse(error_object(message, "invalid_request_error"), 413)
    return None


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refusal(_: HttpRequest, error: Refusal) -> JSONResponse:
        return JSONResponse(error.content, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse(error_object("the body is not valid JSON", "invalid_request_error"), 400)
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        what = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if first["type"] == "extra_forbidden":
            what = "is not supported; leave it out"
        message = f"{place}: {what}" if place else what
        return JSONResponse(error_object(message, "invalid_request_error", param=place or None), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: HttpRequest, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.url.path}; there is {', '.join(PATHS)}"
        return JSONResponse(error_object(message, "invalid_request_error"), error.status_code)


class Service:
    """Turns requests into jobs, and finished jobs into responses."""

    def __init__(self, opened: Opened, scheduler: Scheduler) -> None:
        self.opened, self.scheduler = opened, scheduler

    def answerer(self, name: str) -> int:
        """The index of a model. Raises Refusal (404) if there is none of that name."""
        try:
            return self.opened.index_of(name)
        except InputError as error:
            raise Refusal(404, str(error), code="model_not_found", param="model") from None

    def understand_completion(self, request: CompletionRequest) -> Asked:
        """Raises Refusal for prompts that cannot be answered."""
        answerer, form = self.answerer(request.model), self.opened.form
        prompts = [form.plain(one) if isinstance(one, str) else list(one) for one in request.prompts]
        vocabulary = self.opened.ensemble.agents.config.get_text_config().vocab_size
        if not prompts or not all(prompts) or any(token >= vocabulary for ids in prompts for token in ids):
            raise Refusal(400, f"prompt: needs text, or token ids from 0 to {vocabulary - 1}", param="prompt")
        max_new = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        texts = self._texts(request, answerer, prompts, max_new, form.end_ids, request.logprobs or 0)
        has_tokens = request.logprobs is not None
        echoes = (
            [self._echo(*pair) for pair in zip(request.prompts, prompts, strict=True)] if request.echo else []
        )
        scores = [Score(answerer, tuple(ids)) for ids in prompts] if request.echo and has_tokens else []
        return Asked(request, prompts, texts, scores, echoes, has_tokens)

    def understand_chat(self, request: ChatRequest) -> Asked:
        """Raises Refusal for messages that cannot be answered."""
        answerer, form = self.answerer(request.model), self.opened.form
        turns = [message.as_turn() for message in request.messages]
        if form.chat is None and len(turns) > 1:
            raise Refusal(
                400,
                "messages: these agents were trained on single questions; send one message",
                param="messages",
            )
        try:
            prompt = form.ask(turns)
        except InputError as error:
            raise Refusal(400, f"messages: {error}", param="messages") from None
        wanted = request.max_completion_tokens or request.max_tokens
        max_new = wanted or max(1, self.scheduler.most_tokens - len(prompt))
        tops = (request.top_logprobs or 0) if request.logprobs else 0
        texts = self._texts(request, answerer, [prompt], max_new, form.end_ids, tops)
        return Asked(request, [prompt], texts, [], [], bool(request.logprobs))

    def _echo(self, given: str | list[int], ids: list[int]) -> Echo:
        pieces = Ending(0, frozenset(), (), self.opened.ensemble.tokenizer).pieces(Answer(token_ids=ids))
        return Echo(given if isinstance(given, str) else "".join(pieces), pieces)

    def _texts(
        self,
        request: Request,
        answerer: int,
        prompts: Sequence[list[int]],
        max_new: int,
        end_ids: frozenset[int],
        tops: int,
    ) -> list[Text]:
        n = request.n or 1
        if n * len(prompts) > self.scheduler.max_texts:
            most = self.scheduler.max_texts
            message = (
                f"n: {n * len(prompts)} answers are more than {most}; ask for fewer at a time, or start the "
                "server with a larger --max-texts"
            )
            raise Refusal(400, message, param="n")
        try:
            for ids in prompts:
                self.opened.refuse_too_long(len(ids), max_new, self.scheduler.most_tokens)
        except InputError as error:
            raise Refusal(400, str(error), code="context_length_exceeded") from None
        ending = Ending(max_new, end_ids, request.stops, self.opened.ensemble.tokenizer)
        temperature = 1.0 if request.temperature is None else request.temperature
        top_p = 1.0 if request.top_p is None else request.top_p
        seed = secrets.randbits(31) if request.seed is None else request.seed
        if max_new == 0:
            return []
        return [
            Text(answerer, tuple(ids), ending, Sampling(temperature, top_p, seed, place * n + number), tops)
            for place, ids in enumerate(prompts)
            for number in range(n)
        ]

    async def answer(self, asked: Asked, http: HttpRequest) -> Any:
        """The response: whole, or as a stream of events."""
        watched = Watched(asked.texts, asked.scores, bool(asked.request.stream), asked.has_tokens)
        try:
            self.scheduler.submit(watched.job)
        except Busy:
            raise Refusal(429, "too many requests wait; try again later", "rate_limit_error") from None
        except Closing:
            raise Refusal(503, "the server is shutting down", "server_error") from None
        if asked.request.stream:
            events = self._events(asked, watched)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"cache-control": "no-store"}
            )
        await self._finished(watched, http)
        return JSONResponse(responses.whole(asked))

    async def _finished(self, watched: Watched, http: HttpRequest) -> None:
        """Wait for the job, as long as its client does."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(watched.deltas.get(), LOOK_S)
                break
            if await http.is_disconnected():
                self.scheduler.cancel(watched.job)
                raise Refusal(499, "the client disconnected")
        if watched.job.error is not None:
            raise Refusal(500, watched.job.error, "server_error")

    async def _events(self, asked: Asked, watched: Watched) -> AsyncIterator[str]:
        """Server-sent events. If the client disconnects the generator is closed, which cancels its job."""
        head = responses.about(asked, "chunk")
        try:
            if isinstance(asked.request, ChatRequest):
                for index in range(len(asked.texts)):
                    first = {
                        "index": index,
                        "delta": {"role": "assistant", "content": ""},
                        "finish_reason": None,
                    }
                    yield responses.event_of({**head, "choices": [first]})
            while (delta := await watched.deltas.get()) is not None:
                yield responses.event_of({**head, "choices": [responses.chunk_of(asked, delta)]})
            if watched.job.error is not None:
                yield responses.event_of(error_object(watched.job.error, "server_error"))
            else:
                options = asked.request.stream_options
                if options is not None and options.include_usage:
                    yield responses.event_of({**head, "choices": [], "usage": asked.usage})
                yield "data: [DONE]\n\n"
        finally:
            if not watched.job.is_done:
                self.scheduler.cancel(watched.job)
