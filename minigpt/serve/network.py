"""The network side: how many connections, timeouts of slow clients, and shutdown."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import time
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from minigpt.serve.middleware import error_response
from minigpt.serve.worker import Worker

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024  # fewer where the process may open few files
ACCEPT_LOG_INTERVAL = 60.0  # seconds between log lines about connections that cannot be accepted
CLIENT_TIMEOUT = 30.0  # seconds for a whole request to arrive, or for a full buffer to drain
GRACE = 3.0  # seconds that running answers get when the server is to stop


def max_connections() -> int:
    """Return how many connections are taken: they get half of the files that may be open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, files // 2)


class State(ServerState):
    """What all connections share.

    Attributes:
        waiting: the connections of which no request is being answered; the longest waiting first.
        max_connections: when there are more, those that wait are closed for new ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[Protocol, None] = {}
        self.max_connections = max_connections()


class Protocol(H11Protocol):
    """HTTP/1.1 that cuts off a client too slow to send or to read."""

    server_state: State

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, in place of the connection that has waited longest if need be."""
        super().connection_made(transport)
        if len(self.connections) > self.server_state.max_connections:
            self._make_room()
        # asyncio leaves Nagle's delay on where a socket was made without naming its protocol.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self._update_read_timer()

    def data_received(self, data: bytes) -> None:
        """Read data; a request that is complete ends the wait."""
        super().data_received(data)
        self._update_read_timer()

    def on_response_complete(self) -> None:
        """Wait for the next request, part of which may have come already."""
        super().on_response_complete()
        self._update_read_timer()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._set_timer("write", True)

    def resume_writing(self) -> None:
        """End the wait for the client to read."""
        super().resume_writing()
        self._set_timer("write", False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        super().connection_lost(exc)
        self.server_state.waiting.pop(self, None)
        self._set_timer("read", False)
        self._set_timer("write", False)

    def _make_room(self) -> None:
        """Close the connection that has waited longest, or else refuse this one's request."""
        oldest = next(iter(self.server_state.waiting), None)
        if oldest is not None:
            del self.server_state.waiting[oldest]
            oldest.transport.close()
            return
        message = "All connections are taken. Try again."
        # Sent when the request has come: a client that is still sending may not read it.
        self.app = error_response(503, message, retry_after="1", connection="close")

    def _update_read_timer(self) -> None:
        self._set_timer("read", self.conn.their_state in (h11.IDLE, h11.SEND_BODY))
        if "read" in self.timers:
            self.server_state.waiting.setdefault(self)
        else:
            self.server_state.waiting.pop(self, None)

    def _set_timer(self, direction: str, on: bool) -> None:
        if on and direction not in self.timers:
            self.timers[direction] = self.loop.call_later(CLIENT_TIMEOUT, self.transport.abort)
        elif not on and direction in self.timers:
            self.timers.pop(direction).cancel()


class Server(uvicorn.Server):
    """A server that ends what still runs before it stops.

    Args:
        app: the application.
        worker: what computes.
    """

    def __init__(self, app: FastAPI, worker: Worker) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            server_header=False,
            log_config=None,
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=int(GRACE) + 2,  # longer than the answers that are ended
        )
        super().__init__(config)
        self.server_state: State = State()
        self.worker = worker
        self._last_accept_error = -ACCEPT_LOG_INTERVAL

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        asyncio.get_running_loop().set_exception_handler(self._handle_loop_error)
        await super().startup(sockets)

    def _handle_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an error; one of thousands a second where no connection can be accepted."""
        if "accept" not in context["message"]:
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._last_accept_error + ACCEPT_LOG_INTERVAL:
            self._last_accept_error = time.monotonic()
            log.error("Connections cannot be accepted: %s.", context.get("exception"))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers end, or end them after the grace."""
        timer = asyncio.get_running_loop().call_later(GRACE, self.worker.end_requests)
        await super().shutdown(sockets)
        timer.cancel()


def run(app: FastAPI, worker: Worker, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGHUP, and return; Ctrl-C raises KeyboardInterrupt.

    SIGHUP stays ignored where it is, as under `nohup`.
    """
    server = Server(app, worker)
    # uvicorn raises the signal again once it has stopped: this handler then ignores it.
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: None)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(
            signal.SIGHUP, lambda *_: server.handle_exit(signal.SIGTERM, None)
        )
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
