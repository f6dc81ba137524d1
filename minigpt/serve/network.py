"""The network side: timeouts of slow clients, and shutdown."""

from __future__ import annotations

import asyncio
import signal
import socket

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt.serve.worker import Worker

CLIENT_TIMEOUT = 30.0  # seconds for a whole request to arrive, or for a full buffer to drain
GRACE = 3.0  # seconds that running answers get when the server is to stop


class Protocol(H11Protocol):
    """HTTP/1.1 that cuts off a client too slow to send or to read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        # asyncio leaves Nagle's delay on where a socket was made without naming its protocol.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self._wait("read", True)

    def data_received(self, data: bytes) -> None:
        """Read data; a request that is complete ends the wait."""
        super().data_received(data)
        self._wait("read", self.conn.their_state in (h11.IDLE, h11.SEND_BODY))

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self._wait("write", True)

    def resume_writing(self) -> None:
        """End the wait for the client to read."""
        super().resume_writing()
        self._wait("write", False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        super().connection_lost(exc)
        self._wait("read", False)
        self._wait("write", False)

    def _wait(self, direction: str, waits: bool) -> None:
        if waits and direction not in self.timers:
            self.timers[direction] = self.loop.call_later(CLIENT_TIMEOUT, self.transport.abort)
        elif not waits and direction in self.timers:
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
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers end, or end them after the grace."""
        message = "The server was stopped."
        timer = asyncio.get_running_loop().call_later(
            GRACE, lambda: self.worker.fail(self.worker.completions, message)
        )
        await super().shutdown(sockets)
        timer.cancel()


def run(app: FastAPI, worker: Worker, listener: socket.socket) -> None:
    """Serve until SIGTERM, and return; Ctrl-C raises KeyboardInterrupt."""
    # uvicorn sends itself the signal again once it has stopped: this time it means nothing.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        Server(app, worker).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
