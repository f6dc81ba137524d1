"""The application: OpenAI's endpoints, health, metrics and the web page."""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from prometheus_client import generate_latest
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from minigpt.data.formats import Message
from minigpt.errors import MiniGPTError
from minigpt.infer.engine import Engine
from minigpt.serve.middleware import HEADERS, AccessMiddleware, Metrics, error_response
from minigpt.serve.schema import (
    MAX_LOGPROBS,
    ChatRequest,
    CompletionRequest,
    ResponseBuilder,
    TextRequest,
)
from minigpt.serve.worker import Completion, QueueFullError, ServingError, Worker

LONG_BODY = 2**16  # bytes; shorter ones are parsed in two milliseconds or less
PAUSE_RATIO = 9.0  # seconds without long bodies for each second that parsing one took
Prompt = str | list[int] | list[Message]
Body = TypeVar("Body", bound=CompletionRequest)
Result = TypeVar("Result")


class RefusedError(Exception):
    """A request that is answered by an error; the arguments are those of `error_response`."""


class EventStream(StreamingResponse):
    """A stream of server-sent events, whose slots are freed however it ends."""

    def __init__(self, completion: Completion, worker: Worker, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self.completion = completion
        self.worker = worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.worker.cancel(self.completion)


class Endpoints:
    """The endpoints of all paths.

    Args:
        worker: computes the answers.
        timeout: seconds that a request may take.
    """

    def __init__(self, worker: Worker, timeout: float) -> None:
        self.worker = worker
        self.timeout = timeout
        self.started_at = int(time.time())
        self.metrics = Metrics(worker)
        self.page_response = page_response()
        self.bodies = BodyReader()

    def paths(self) -> dict[str, Callable[..., Awaitable[object]]]:
        """Return the endpoints by their paths."""
        return {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.text,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/health": self.health,
            "/metrics": self.prometheus,
            "/": self.page,
        }

    async def models(self) -> dict[str, Any]:
        """List the models."""
        models = [await self.model(name) for name in self.worker.engines]
        return {"object": "list", "data": models}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe a model; `chat` says whether it has a chat template."""
        engine = self._engine(name)
        return {
            "id": name,
            "object": "model",
            "created": self.started_at,
            "owned_by": "minigpt",
            "max_model_len": engine.context,
            "chat": engine.codec is not None,
        }

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        deadline = self._deadline()
        body = await self.bodies.read(request, ChatRequest, deadline)
        if self._engine(body.model).codec is None:
            reason = "has no chat template: continue text with /v1/completions instead."
            raise RefusedError(400, f"{body.model!r} {reason}", "no_chat_template", "model")
        messages = [message.to_message() for message in body.messages]
        return await self._answer(body, request, [messages], "messages", deadline)

    async def text(self, request: Request) -> Response:
        """Continue texts."""
        deadline = self._deadline()
        body = await self.bodies.read(request, TextRequest, deadline)
        return await self._answer(body, request, body.prompts(), "prompt", deadline)

    async def health(self) -> Response:
        """Say whether answers are being computed."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def prometheus(self) -> Response:
        """Return the metrics in Prometheus' text format."""
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(generate_latest(self.metrics.registry), media_type=media_type)

    async def page(self) -> Response:
        """Return the web page."""
        return self.page_response

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.timeout

    def _engine(self, name: str) -> Engine:
        if name not in self.worker.engines:
            served = ", ".join(self.worker.engines)
            message = f"The model {name!r} does not exist. Served: {served}."
            raise RefusedError(404, message, "model_not_found", "model")
        return self.worker.engines[name]

    async def _ids(self, model: str, prompt: Prompt, param: str) -> list[int]:
        """Return a prompt's ids, which leave room for an answer."""
        engine = self._engine(model)
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            check_length(len(prompt), engine.context, engine, param)
            if max(prompt) >= engine.rows:
                raise RefusedError(400, f"Token ids must be below {engine.rows}.", None, param)
            return prompt
        texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
        limit = self.worker.encoders[model].max_characters
        unit = " characters, which are more tokens"
        check_length(sum(map(len, texts)), limit, engine, param, unit)
        ids = await self.worker.encode(model, prompt)
        check_length(len(ids), engine.context, engine, param)
        return ids

    async def _encoded(self, model: str, prompts: Sequence[Prompt], param: str) -> list[list[int]]:
        return [await self._ids(model, prompt, param) for prompt in prompts]

    async def _answer(
        self,
        body: CompletionRequest,
        request: Request,
        prompts: Sequence[Prompt],
        param: str,
        deadline: float,
    ) -> Response:
        context = self._engine(body.model).context
        with self.worker.reserved(body.model, len(prompts) * body.n):
            async with asyncio.timeout_at(deadline):
                encoded = await until_disconnect(request, self._encoded(body.model, prompts, param))
        sequences = [
            (ids, sampling) for ids in encoded for sampling in body.samplings(context - len(ids))
        ]
        check_logprobs(body, sum(sampling.max_new_tokens for _, sampling in sequences))
        builder = ResponseBuilder(body, sum(map(len, encoded)), len(sequences))
        completion = self.worker.submit(body.model, sequences)
        self.metrics.prompt_tokens.labels(body.model).inc(builder.prompt_tokens)
        if body.stream:
            events = self._events(completion, builder, deadline)
            return EventStream(completion, self.worker, events)
        try:
            async with asyncio.timeout_at(deadline):
                await until_disconnect(request, self._finish(completion, builder))
        finally:
            self.worker.cancel(completion)
        return JSONResponse(builder.body(), headers=HEADERS)

    async def _chunks(
        self, completion: Completion, builder: ResponseBuilder
    ) -> AsyncIterator[dict[str, Any] | None]:
        first = True
        async for index, delta in completion.deltas():
            if first:
                seconds = time.perf_counter() - completion.started_at
                self.metrics.first_token_seconds.labels(completion.model).observe(seconds)
            first = False
            self.metrics.generated_tokens.labels(completion.model).inc(len(delta.ids))
            yield builder.add(index, delta)

    async def _finish(self, completion: Completion, builder: ResponseBuilder) -> None:
        async for _ in self._chunks(completion, builder):
            pass

    async def _events(
        self, completion: Completion, builder: ResponseBuilder, deadline: float
    ) -> AsyncIterator[str]:
        """Yield the events of a stream; an error is the last of them."""
        chunks = self._chunks(completion, builder)
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(chunks)
                if chunk is not None:
                    yield event(chunk)
        except StopAsyncIteration:
            if builder.streams_usage:
                yield event(builder.usage_chunk())
            yield "data: [DONE]\n\n"
        except (ServingError, TimeoutError) as error:
            yield f"data: {bytes(server_error(error).body).decode()}\n\n"


class BodyReader:
    """Reads the bodies of requests.

    Parsing holds up all else. So long bodies are parsed one at a time, with a pause after each in
    which other requests are answered.
    """

    def __init__(self) -> None:
        self._parsing_lock = asyncio.Lock()

    async def read(self, request: Request, kind: type[Body], deadline: float) -> Body:
        """Return the body of a request, checked.

        Raises:
            RefusedError: for a body that is no JSON, or not what the API takes.
            ClientDisconnect: when the client leaves.
            TimeoutError: when a long body waits for others beyond the deadline, a time of the loop.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":  # pages elsewhere can send other types without asking
            message = "Send the body as JSON, with the header Content-Type: application/json."
            raise RefusedError(400, message)
        content = await request.body()
        if len(content) <= LONG_BODY:
            return parse(content, kind)
        await until_disconnect(request, self._acquire(deadline))
        started = time.perf_counter()
        try:
            return parse(content, kind)
        finally:
            pause = PAUSE_RATIO * (time.perf_counter() - started)
            asyncio.get_running_loop().call_later(pause, self._parsing_lock.release)

    async def _acquire(self, deadline: float) -> None:
        # In the task that acquires, or the lock could stay with a request that has timed out.
        async with asyncio.timeout_at(deadline):
            await self._parsing_lock.acquire()


def parse(content: bytes, kind: type[Body]) -> Body:
    """Return a body, parsed and checked; errors are those of `BodyReader.read`."""
    try:
        with without_garbage_collection():
            return kind.model_validate(from_json(content, allow_inf_nan=False))
    except ValidationError as error:
        raise RefusedError(*invalid_body(error)) from None
    except ValueError as error:
        message = f"The body is not valid JSON: {error}."
        raise RefusedError(400, message, "invalid_json") from None


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turn Python's garbage collector off for as long as this lasts.

    While a megabyte of empty lists is parsed, it goes through all objects of the process many
    times: half a second in which no other thread runs, of which parsing takes 0.03.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_length(length: int, limit: int, engine: Engine, param: str, unit: str = "") -> None:
    """Refuse a prompt that leaves the context no room for an answer.

    Args:
        length: the prompt's length, in tokens or characters.
        limit: the length, in the same unit, that fills the context.
        engine: the model.
        param: the prompt's field.
        unit: follows the length in the message; empty for tokens.
    """
    if length >= limit:
        message = f"The maximum context length is {engine.context} tokens, the answer included; "
        message += f"the prompt has {length}{unit}. Shorten it."
        raise RefusedError(400, message, "context_length_exceeded", param)


def check_logprobs(body: CompletionRequest, tokens: int) -> None:
    """Refuse an answer of up to `tokens` tokens with more log-probs than one body may hold."""
    count = body.n_top_logprobs()
    if not body.stream and count is not None and tokens * (count + 1) > MAX_LOGPROBS:
        message = f"An answer may have {MAX_LOGPROBS} log-probs, and this may have {tokens} tokens "
        message += f"with {count + 1} each. Set max_tokens lower, or stream."
        raise RefusedError(400, message, None, "logprobs")


async def until_disconnect(request: Request, work: Coroutine[object, object, Result]) -> Result:
    """Return what work gives; cancel it and raise ClientDisconnect when the client leaves."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, departure = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        departure.cancel()


def event(chunk: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def page_response() -> Response:
    """Return the web page, under a policy that runs its own script and nothing else."""
    text = resources.files("minigpt.serve").joinpath("page.html").read_text(encoding="utf-8")

    def source_hash(tag: str) -> str:
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = hashlib.sha256(content.group(1).encode() if content else b"").digest()
        return f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"

    policy = f"default-src 'none'; {source_hash('script')}; {source_hash('style')}; "
    policy += "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    policy += "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    privacy = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
    return HTMLResponse(text, headers=HEADERS | privacy)


def server_error(error: Exception) -> Response:
    """Return the response to a request that failed on the server's side."""
    if isinstance(error, TimeoutError):
        message = "The answer took longer than this server allows."
        return error_response(504, message, "timeout")
    if isinstance(error, ServingError):
        return error_response(error.status, str(error), "server_error")
    return error_response(500, "The server failed on this request.", "server_error")


def invalid_body(error: ValidationError) -> tuple[int, str, str | None, str | None]:
    """Return the error of a body that is not what the API takes, as `error_response` takes it."""
    details = error.errors(include_url=False, include_input=False)
    # A field that takes several forms has errors for each: the deepest is of the likeliest form.
    deepest = max(details, key=lambda detail: len(detail["loc"]))
    reason = deepest["msg"].removeprefix("Value error, ")
    if deepest["type"] == "extra_forbidden":
        reason = "not supported"
    field = [str(key) for key in deepest["loc"]]
    message = f"{'.'.join(field) or 'body'}: {reason}"
    return 400, message, None, field[0] if field else None


async def handle(_: Request, error: Exception) -> Response:
    """Return the response to an error, in OpenAI's form."""
    match error:
        case RefusedError():
            return error_response(*error.args)
        case MiniGPTError():
            return error_response(400, str(error))
        case ClientDisconnect():
            return Response(status_code=499)  # for the metrics: nobody reads it
        case HTTPException():
            return error_response(error.status_code, str(error.detail))
        case QueueFullError():
            message = "The queue is full. Try again."
            return error_response(429, message, "queue_full", retry_after="1")
    return server_error(error)


HANDLED = (
    RefusedError,
    MiniGPTError,
    ClientDisconnect,
    HTTPException,
    QueueFullError,
    TimeoutError,
    ServingError,
    Exception,
)


def create_app(
    worker: Worker, key: str | None = None, max_body: int = 2**20, timeout: float = 600.0
) -> FastAPI:
    """Return the application.

    Args:
        worker: computes the answers; it starts and stops with the application.
        key: the Bearer key that clients must send; None asks for none.
        max_body: longest body in bytes.
        timeout: seconds that a request may take.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(title="MiniGPT", lifespan=lifespan, docs_url=None, redoc_url=None)
    endpoints = Endpoints(worker, timeout)
    for path, endpoint in endpoints.paths().items():
        method = "POST" if path.endswith("completions") else "GET"
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    app.add_middleware(AccessMiddleware, metrics=endpoints.metrics, key=key, max_body=max_body)
    for kind in HANDLED:
        app.exception_handler(kind)(handle)
    return app
