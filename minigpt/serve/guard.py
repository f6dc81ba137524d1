"""What stands between the network and the application: who may ask, how much, how slowly."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import time
from typing import Any

import h11
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

OPEN = {"/", "/health"}  # they hold nothing that needs a key
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
PATIENCE = 30.0  # seconds for a whole request to arrive, or for a full buffer to drain
HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


def refusal(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """Return an error in OpenAI's form. ASCII, as a client's words may be no valid Unicode."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message[:1000], "type": kind, "param": param, "code": code}
    body = json.dumps({"error": error})
    return Response(body, status, HEADERS | (headers or {}), "application/json")


class Traffic:
    """Counts of requests, for Prometheus.

    Args:
        registry: where they are registered.
        paths: those counted by name; what else is asked for counts as "other".
    """

    def __init__(self, registry: CollectorRegistry, paths: set[str]) -> None:
        self.paths = paths
        self.requests = Counter(
            "minigpt_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "minigpt_request_seconds", "Time to answer in full.", ["path"], registry=registry
        )

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count a request; status 499 stands for a client that left before its answer."""
        path = path if path in self.paths else "other"
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)


class Guard:
    """Middleware that refuses before anything is read or computed.

    Args:
        app: the application.
        traffic: where requests are counted.
        key: the Bearer key; None for an open server, which then listens on loopback only and
            answers only to loopback names, so that no web page can reach it by another one.
        max_body: longest body in bytes.
    """

    def __init__(self, app: ASGIApp, traffic: Traffic, key: str | None, max_body: int) -> None:
        self.app, self.traffic, self.max_body = app, traffic, max_body
        self.digest = None if key is None else hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = {
            name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]
        }
        answer: ASGIApp | None = self._refuses(scope, headers)
        if answer is None and scope["method"] == "POST":
            body = await self._read(receive)
            if body is None:
                answer = self._too_long()
            else:
                receive = _replayed(body, receive)
        try:
            await (answer or self.app)(scope, receive, counted)
        finally:
            self.traffic.count(scope["path"], status, time.perf_counter() - start)

    def _refuses(self, scope: Scope, headers: dict[str, str]) -> Response | None:
        if self.digest is None:
            if not LOOPBACK.fullmatch(headers.get("host", "")):
                return refusal(403, "This server answers to localhost only.")
        elif scope["path"] not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(given.strip().encode()).digest()
            if not hmac.compare_digest(digest, self.digest) or scheme.lower() != "bearer":
                asks = {"www-authenticate": "Bearer"}
                return refusal(401, "Incorrect API key.", "invalid_api_key", headers=asks)
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return refusal(415, "Send the body as application/json.")
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > self.max_body:
                return self._too_long()
        return None

    def _too_long(self) -> Response:
        return refusal(413, f"The body is longer than {self.max_body} bytes.")

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, or None when it is too long."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.max_body:
                return None
            if not message.get("more_body"):
                return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


class Protocol(H11Protocol):
    """HTTP/1.1 with an end to patience: a client too slow to send or to read is cut off."""

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for a request."""
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Take what came; a request that is complete ends the wait."""
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._await_request()
        elif self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._writing = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        if self._reading is None:
            self._reading = self.loop.call_later(PATIENCE, self.transport.abort)
