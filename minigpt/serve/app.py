"""The application: OpenAI's endpoints, health, metrics and the page."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from minigpt.errors import MiniGPTError
from minigpt.infer.engine import Engine
from minigpt.serve.guard import HEADERS, Guard, Metrics, refusal
from minigpt.serve.schema import Answer, ChatRequest, TextRequest, Wanted
from minigpt.serve.worker import Job, QueueFullError, ServingError, Worker


class RefusedError(Exception):
    """A request that is answered by an error; the arguments are those of `refusal`."""


class Events(StreamingResponse):
    """A stream of server-sent events, whose places are freed however it ends."""

    def __init__(self, job: Job, worker: Worker, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self.job, self.worker = job, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.worker.cancel(self.job)


class Endpoints:
    """What is answered under each path.

    Args:
        worker: what computes.
        timeout: seconds that a request may take.
    """

    def __init__(self, worker: Worker, timeout: float) -> None:
        self.worker, self.timeout, self.since = worker, timeout, int(time.time())
        self.metrics, self.html = Metrics(worker), page()

    def paths(self) -> dict[str, Callable[..., Any]]:
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
        listed = [await self.model(name) for name in self.worker.engines]
        return {"object": "list", "data": listed}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe a model; `chat` says whether it has a chat template."""
        engine = self._engine(name)
        about = {"id": name, "object": "model", "created": self.since, "owned_by": "minigpt"}
        return about | {"max_model_len": engine.context, "chat": engine.codec is not None}

    async def chat(self, wanted: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        if self._engine(wanted.model).codec is None:
            words = "has no chat template: continue text with /v1/completions instead."
            raise RefusedError(400, f"{wanted.model!r} {words}", "no_chat_template", "model")
        messages = [message.record() for message in wanted.messages]
        return await self._answer(wanted, request, [messages], "messages")

    async def text(self, wanted: TextRequest, request: Request) -> Response:
        """Continue texts."""
        size, prompts = self._engine(wanted.model).rows, wanted.prompts()
        if any(max(prompt) >= size for prompt in prompts if not isinstance(prompt, str)):
            raise RefusedError(400, f"Token ids must be below {size}.", None, "prompt")
        return await self._answer(wanted, request, prompts, "prompt")

    async def health(self) -> Response:
        """Say whether answers are being computed."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def prometheus(self) -> Response:
        """Tell the counts in Prometheus' text format."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(generate_latest(self.metrics.registry), media_type=kind)

    async def page(self) -> Response:
        """Return the web page."""
        return self.html

    def _engine(self, name: str) -> Engine:
        if name not in self.worker.engines:
            words = f"The model {name!r} does not exist. Served: {', '.join(self.worker.engines)}."
            raise RefusedError(404, words, "model_not_found", "model")
        return self.worker.engines[name]

    async def _ids(self, model: str, prompt: Any) -> list[int]:
        known = isinstance(prompt, list) and isinstance(prompt[0], int)
        return prompt if known else await self.worker.encode(model, prompt)

    async def _answer(
        self, wanted: Wanted, request: Request, asked: list[Any], param: str
    ) -> Response:
        end = asyncio.get_running_loop().time() + self.timeout
        context, sequences = self._engine(wanted.model).context, []
        self.worker.check_room(wanted.model, len(asked) * wanted.n)
        async with asyncio.timeout_at(end):
            prompts = [await self._ids(wanted.model, prompt) for prompt in asked]
        for ids in prompts:
            if len(ids) >= context:
                words = f"The maximum context length is {context} tokens, the answer included; "
                words += f"the prompt has {len(ids)}. Shorten it."
                raise RefusedError(400, words, "context_length_exceeded", param)
            sequences += [(ids, sampling) for sampling in wanted.samplings(context - len(ids))]
        answer = Answer(wanted, sum(map(len, prompts)), len(sequences))
        job = self.worker.submit(wanted.model, sequences)
        self.metrics.prompt.labels(wanted.model).inc(answer.prompt_tokens)
        if wanted.stream:
            return Events(job, self.worker, self._events(job, answer, end))
        try:
            async with asyncio.timeout_at(end):
                await while_there(request, self._whole(job, answer))
        finally:
            self.worker.cancel(job)
        return JSONResponse(answer.whole(), headers=HEADERS)

    async def _chunks(self, job: Job, answer: Answer) -> AsyncIterator[dict[str, Any] | None]:
        begun = False
        async for index, delta in job.parts():
            if not begun:
                self.metrics.first.labels(job.model).observe(time.perf_counter() - job.since)
            begun = True
            self.metrics.said.labels(job.model).inc(len(delta.ids))
            yield answer.add(index, delta)

    async def _whole(self, job: Job, answer: Answer) -> None:
        async for _ in self._chunks(job, answer):
            pass

    async def _events(self, job: Job, answer: Answer, end: float) -> AsyncIterator[str]:
        """Yield the events of a stream; what goes wrong is told as one of them."""
        chunks = self._chunks(job, answer)
        try:
            while True:
                async with asyncio.timeout_at(end):
                    chunk = await anext(chunks)
                if chunk is not None:
                    yield event(chunk)
        except StopAsyncIteration:
            if answer.tells_usage:
                yield event(answer.closing())
            yield "data: [DONE]\n\n"
        except (ServingError, TimeoutError) as error:
            yield f"data: {bytes(failure(error).body).decode()}\n\n"


async def while_there(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Do work until the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = {asyncio.ensure_future(work), asyncio.ensure_future(left())}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def event(body: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def page() -> Response:
    """Return the web page, under a policy that runs its own script and nothing else."""
    text = resources.files("minigpt.serve").joinpath("page.html").read_text(encoding="utf-8")

    def own(tag: str) -> str:
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = hashlib.sha256(inside.group(1).encode() if inside else b"").digest()
        return f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'"

    policy = f"default-src 'none'; {own('script')}; {own('style')}; connect-src 'self'; "
    policy += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    policy += "require-trusted-types-for 'script'; trusted-types 'none'"
    quiet = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
    return HTMLResponse(text, headers=HEADERS | quiet)


def failure(error: Exception) -> Response:
    """Return the answer to a request that failed on the server's side."""
    if isinstance(error, TimeoutError):
        return refusal(504, "The answer took longer than this server allows.", "timeout")
    status = error.status if isinstance(error, ServingError) else 500
    return refusal(status, str(error) or "The server failed on this request.", "server_error")


def invalid(error: RequestValidationError) -> Response:
    """Return the answer to a body that is no JSON, or not what the API takes."""
    first = max(error.errors(), key=lambda one: len(one["loc"]))  # of several forms, the nearest
    if first["type"] == "json_invalid":
        return refusal(400, f"The body is not valid JSON: {first['ctx']['error']}.", "invalid_json")
    words = str(first["msg"]).removeprefix("Value error, ")
    words = "not supported" if first["type"] == "extra_forbidden" else words
    place = [str(part) for part in first["loc"][1:]]
    return refusal(400, f"{'.'.join(place) or 'body'}: {words}", None, place[0] if place else None)


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
    ends = Endpoints(worker, timeout)
    for path, end in ends.paths().items():
        method = "POST" if path.endswith("completions") else "GET"
        app.add_api_route(path, end, methods=[method], response_model=None)
    app.add_middleware(Guard, metrics=ends.metrics, key=key, max_body=max_body)
    for kind, answer in refusals().items():

        async def handler(_: Request, error: Exception, answer: Any = answer) -> Response:
            return answer(error)  # type: ignore[no-any-return]

        app.exception_handler(kind)(handler)
    return app


def refusals() -> dict[type[Exception], Any]:
    """Return the answers to errors: all in OpenAI's form."""
    full = ("All places are taken. Try again.", "queue_full")
    return {
        RefusedError: lambda error: refusal(*error.args),
        MiniGPTError: lambda error: refusal(400, str(error)),
        RequestValidationError: invalid,
        HTTPException: lambda error: refusal(error.status_code, str(error.detail)),
        QueueFullError: lambda _: refusal(429, *full, retry_after="1"),
        TimeoutError: failure,
        ServingError: failure,
        Exception: lambda _: failure(Exception()),
    }
