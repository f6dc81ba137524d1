"""The application: OpenAI's endpoints, health, metrics and the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from minigpt.errors import MiniGPTError
from minigpt.infer.engine import Engine
from minigpt.serve.guard import HEADERS, Guard, Traffic, refusal
from minigpt.serve.schema import Answer, ChatRequest, TextRequest, Wanted
from minigpt.serve.worker import Job, QueueFullError, ServingError, Worker

T = TypeVar("T")


class Refused(Exception):
    """A request that is answered by an error; the arguments are those of `refusal`."""


class ModelMetrics:
    """What the models did, for Prometheus."""

    def __init__(self, worker: Worker, registry: CollectorRegistry) -> None:
        def counted(kind: Any, name: str, words: str) -> Any:
            return kind(f"minigpt_{name}", words, ["model"], registry=registry)

        self.prompt = counted(Counter, "prompt_tokens", "Tokens of prompts.")
        self.said = counted(Counter, "generated_tokens", "Tokens generated.")
        self.first = counted(Histogram, "first_token_seconds", "Time to an answer's first token.")
        active = counted(Gauge, "active_sequences", "Sequences being written.")
        waiting = counted(Gauge, "waiting_sequences", "Sequences waiting for a place.")
        for model in worker.engines:
            active.labels(model).set_function(lambda m=model: worker.batches[m].active)
            waiting.labels(model).set_function(
                lambda m=model: max(0, worker.load(m) - worker.batches[m].active)
            )


class Events(StreamingResponse):
    """A stream of server-sent events, whose places are freed however it ends."""

    def __init__(self, job: Job, worker: Worker, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self.job, self.worker = job, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.worker.cancel(self.job)


def event(body: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what the work gives; cancel it and return None when the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


class Server:
    """The endpoints.

    Args:
        worker: what computes.
        timeout: seconds that a request may take.
    """

    def __init__(self, worker: Worker, timeout: float) -> None:
        self.worker, self.timeout, self.since = worker, timeout, int(time.time())
        self.registry = CollectorRegistry()
        self.metrics = ModelMetrics(worker, self.registry)

    def described(self, name: str) -> dict[str, Any]:
        """Return a model as `/v1/models` lists it; `chat` says whether it has a template."""
        engine = self._engine(name)
        told = {"max_model_len": engine.context, "chat": engine.codec is not None}
        about = {"id": name, "object": "model", "created": self.since, "owned_by": "minigpt"}
        return about | told

    async def models(self) -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [self.described(name) for name in self.worker.engines]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe one model."""
        return self.described(name)

    async def chat(self, wanted: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        if self._engine(wanted.model).codec is None:
            raise Refused(
                400,
                f"The model {wanted.model!r} has no chat template: it was never trained on chats. "
                "Continue text with /v1/completions.",
                "no_chat_template",
                "model",
            )
        messages = [message.record() for message in wanted.messages]
        ids = await self.worker.encode(wanted.model, messages)
        return await self._answer(wanted, request, [ids], "messages")

    async def text(self, wanted: TextRequest, request: Request) -> Response:
        """Continue texts."""
        size = len(self._engine(wanted.model).tokenizer)
        prompts = []
        for prompt in wanted.prompts():
            if isinstance(prompt, str):
                prompts.append(await self.worker.encode(wanted.model, prompt))
            elif prompt and max(prompt) < size:
                prompts.append(prompt)
            else:
                what = f"token ids below {size}, at least one"
                raise Refused(400, f"A prompt must be a string or {what}.", None, "prompt")
        return await self._answer(wanted, request, prompts, "prompt")

    async def health(self) -> Response:
        """Say whether answers are being computed."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def prometheus(self) -> Response:
        """Tell the counts in Prometheus' text format."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(generate_latest(self.registry), media_type=kind)

    def _engine(self, name: str) -> Engine:
        if name not in self.worker.engines:
            known = ", ".join(self.worker.engines)
            message = f"The model {name!r} does not exist. Served: {known}."
            raise Refused(404, message, "model_not_found", "model")
        return self.worker.engines[name]

    async def _answer(
        self, wanted: Wanted, request: Request, prompts: list[list[int]], param: str
    ) -> Response:
        context = self.worker.engines[wanted.model].context
        sequences = []
        for ids in prompts:
            if len(ids) >= context:
                message = (
                    f"The maximum context length of {wanted.model!r} is {context} tokens; the "
                    f"prompt has {len(ids)}, which leaves no room for an answer. Shorten it."
                )
                raise Refused(400, message, "context_length_exceeded", param)
            sequences += [(ids, sampling) for sampling in wanted.samplings(context - len(ids))]
        answer = Answer(wanted, sum(map(len, prompts)), len(sequences))
        job = self.worker.submit(wanted.model, sequences)
        self.metrics.prompt.labels(wanted.model).inc(answer.prompt_tokens)
        if wanted.stream:
            return Events(job, self.worker, self._events(job, answer))
        try:
            async with asyncio.timeout(self.timeout):
                whole = await while_there(request, self._whole(job, answer))
        finally:
            self.worker.cancel(job)
        return Response(status_code=499) if whole is None else JSONResponse(whole, headers=HEADERS)

    async def _parts(self, job: Job, answer: Answer) -> AsyncIterator[list[dict[str, Any]]]:
        """Count the parts of an answer in; yield the chunks that tell each."""
        start: float | None = time.perf_counter()
        async for index, delta in job.parts():
            if start is not None:
                self.metrics.first.labels(job.model).observe(time.perf_counter() - start)
                start = None
            self.metrics.said.labels(job.model).inc(len(delta.ids))
            chunks = answer.part(index, delta)
            answer.add(index, delta)
            yield chunks

    async def _whole(self, job: Job, answer: Answer) -> dict[str, Any]:
        async for _ in self._parts(job, answer):
            pass
        return answer.whole()

    async def _events(self, job: Job, answer: Answer) -> AsyncIterator[str]:
        """Yield the events of a stream; an error after the first is told as one of them."""
        for chunk in answer.opening():
            yield event(chunk)
        parts, end = self._parts(job, answer), time.monotonic() + self.timeout
        try:
            while True:
                async with asyncio.timeout(end - time.monotonic()):
                    chunks = await anext(parts, None)
                if chunks is None:
                    break
                if chunks:
                    yield "".join(map(event, chunks))
        except (ServingError, TimeoutError) as error:
            yield f"data: {failure(error).body.decode()}\n\n"  # type: ignore[union-attr]
            return
        for chunk in answer.closing():
            yield event(chunk)
        yield "data: [DONE]\n\n"


def failure(error: Exception) -> Response:
    """Return the answer to a request that failed on the server's side."""
    if isinstance(error, TimeoutError):
        return refusal(504, "The answer took longer than this server allows.", "timeout")
    return refusal(500, str(error), "server_error")


def page() -> HTMLResponse:
    """Return the web page, under a policy that runs its own script and nothing else."""
    text = resources.files("minigpt.serve").joinpath("page.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = (hashlib.sha256(part.encode()).digest() for part in inside)
        return " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes)

    policy = (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    quiet = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
    return HTMLResponse(text, headers=HEADERS | quiet)


def invalid(error: RequestValidationError) -> Response:
    """Return the answer to a body that is no JSON, or not what the API takes."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return refusal(400, f"The body is not valid JSON: {first['ctx']['error']}.", "invalid_json")
    if first["type"] == "extra_forbidden":
        message = "unrecognized argument"
    return refusal(
        400, ": ".join(filter(None, [".".join(place), message])), None, (place or [None])[0]
    )


def create_app(
    worker: Worker, key: str | None = None, max_body: int = 2**20, timeout: float = 600.0
) -> FastAPI:
    """Return the application.

    Args:
        worker: what computes; it starts and stops with the application.
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
    server, html = Server(worker, timeout), page()
    app.get("/v1/models")(server.models)
    app.get("/v1/models/{name:path}")(server.model)
    app.post("/v1/chat/completions", response_model=None)(server.chat)
    app.post("/v1/completions", response_model=None)(server.text)
    app.get("/health", response_model=None)(server.health)
    app.get("/metrics", response_model=None)(server.prometheus)
    app.get("/", response_model=None)(lambda: html)
    paths = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}
    traffic = Traffic(server.registry, paths)
    app.add_middleware(Guard, traffic=traffic, key=key, max_body=max_body)
    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""
    full = refusal(
        429, "All places are taken. Try again.", "queue_full", None, {"retry-after": "1"}
    )
    answers: dict[type[Exception], Any] = {
        Refused: lambda error: refusal(*error.args),
        MiniGPTError: lambda error: refusal(400, str(error)),
        RequestValidationError: invalid,
        HTTPException: lambda error: refusal(error.status_code, str(error.detail)),
        QueueFullError: lambda _: full,
        TimeoutError: failure,
        ServingError: failure,
        Exception: lambda _: refusal(500, "The server failed on this request.", "server_error"),
    }
    for kind, answer in answers.items():

        async def handler(_: Request, error: Exception, answer: Any = answer) -> Response:
            return answer(error)  # type: ignore[no-any-return]

        app.exception_handler(kind)(handler)
