"""Middleware before the application: access, the limit of bodies, and metrics."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import time
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt.serve.worker import Worker

PUBLIC_PATHS = {"/", "/health"}  # they hold nothing that needs a key
PATHS = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
MAX_BODIES = 64  # of the greatest length, that all requests being answered may have sent
HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_response(
    status: int, message: str, code: str | None = None, param: str | None = None, **headers: str
) -> Response:
    """Return an error in OpenAI's form. ASCII, as a client's words may be no valid Unicode."""
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message[:1000], "type": kind, "param": param, "code": code}
    extra = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(json.dumps({"error": error}), status, HEADERS | extra, "application/json")


class Metrics:
    """Counters and histograms for Prometheus."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "minigpt", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **options)
        self.request_seconds = Histogram("request_seconds", "Time to the end.", ["path"], **options)
        options["labelnames"] = ["model"]
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **options)
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers.", **options)
        self.first_token_seconds = Histogram(
            "first_token_seconds", "Time until an answer begins.", **options
        )
        load = Gauge("load_sequences", "Sequences that are generated or wait.", **options)
        for name in worker.engines:
            load.labels(name).set_function(partial(worker.load, name))


class AccessMiddleware:
    """Refuses requests before anything is computed, and counts all.

    Args:
        app: the application.
        metrics: where requests are counted.
        key: the Bearer key. None for an open server, which listens on loopback only; it answers
            only to loopback names, so that no web page can reach it by a name of its own.
        max_body: longest body in bytes.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None, max_body: int) -> None:
        self.app = app
        self.metrics = metrics
        self.max_body = max_body
        self.received = 0  # bytes of the bodies of requests that are being answered
        self.key_digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and count it; status 499 stands for a client that left."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 499
        size = 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            self.received += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, f"The body is longer than {self.max_body} bytes.")
            if self.received > MAX_BODIES * self.max_body:
                raise HTTPException(503, "Too many long requests at once. Try again.")
            return message

        try:
            await (self._refusal(scope) or self.app)(scope, receive_limited, send_noting_status)
        finally:
            self.received -= size
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.request_seconds.labels(path).observe(time.perf_counter() - start)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.key_digest is None:
            if LOOPBACK.fullmatch(headers.get(b"host", "")):
                return None
            return error_response(403, "This server answers to localhost only.")
        scheme, _, token = headers.get(b"authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("latin-1")).digest()
        valid = hmac.compare_digest(digest, self.key_digest)
        if scope["path"] in PUBLIC_PATHS or (valid and scheme.lower() == "bearer"):
            return None
        message = "Incorrect API key. Send it as: Authorization: Bearer <key>."
        return error_response(401, message, "invalid_api_key", www_authenticate="Bearer")
