"""Run the application until a signal comes."""

from __future__ import annotations

import asyncio
import signal
import socket

import uvicorn
from fastapi import FastAPI

from minigpt.serve.guard import Protocol
from minigpt.serve.worker import Worker

GRACE = 3.0  # seconds that answers get to their end once the server is to stop


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running answers end, and end them after the grace; none is left hanging."""
        loop = asyncio.get_running_loop()
        end = loop.call_later(GRACE, self.worker.fail, "The server was stopped.")
        await super().shutdown(sockets)
        end.cancel()


def server_of(app: FastAPI, worker: Worker) -> uvicorn.Server:
    """Return a server for an application; `run(sockets=[...])` runs it."""
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(GRACE) + 2,
    )
    return _Server(config, worker)


def run(app: FastAPI, worker: Worker, listener: socket.socket) -> None:
    """Serve until SIGTERM, and return; Ctrl-C raises KeyboardInterrupt."""
    # uvicorn sends itself the signal again once it has stopped: this time it means nothing.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server_of(app, worker).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
