"""How many connections a server takes, and which it closes."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
import pytest
from patience import eventually, limit
from serving import QUESTION, Served, running

from minigpt.infer.engine import Engine
from minigpt.serve import network

LONG: dict[str, Any] = {"model": "base", "prompt": QUESTION, "max_tokens": 900_000, "stream": True}


def health(served: Served) -> httpx.Response:
    """Ask over a new connection."""
    with httpx.Client(timeout=limit(60), verify=False) as client:
        return client.get(served.url + "/health")


def test_idle_connections_make_room_for_new_ones(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "CLIENT_TIMEOUT", 10_000)
    with running(engines) as served, contextlib.ExitStack() as stack:
        state = served.server.server_state
        state.max_connections = 4
        idle = [stack.enter_context(served.connect()) for _ in range(12)]
        assert health(served).status_code == 200
        for connection in idle[:8]:
            assert connection.recv(1) == b""  # closed, the longest waiting first
        eventually(lambda: len(state.connections) <= 4)
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle[-1].recv(100).startswith(b"HTTP/1.1 200")


def test_more_connections_than_are_taken(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The answers do not end while this test waits for its turn on a busy machine.
    monkeypatch.setattr(engines["base"], "context", 1_000_000)
    monkeypatch.setattr(engines["base"], "ends", set())
    monkeypatch.setattr(network, "CLIENT_TIMEOUT", 10_000)
    with running(engines) as served:
        served.server.server_state.max_connections = 2
        streams = [served.client.completions.create(**LONG) for _ in range(2)]
        for stream in streams:
            next(iter(stream))
        answer = health(served)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "connections are taken" in answer.json()["error"]["message"]
        for stream in streams:
            stream.close()
        eventually(lambda: health(served).status_code == 200)


def test_time_limit_of_a_pipelined_request(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "CLIENT_TIMEOUT", 10_000)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    state = served.server.server_state
    for part in (head[:10], head + b"Content-Length: 100\r\n\r\n{"):
        with served.connect() as connection:
            connection.sendall(ask + part)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            address = connection.getsockname()
            (protocol,) = [c for c in list(state.connections) if c.client == address]
            assert isinstance(protocol, network.Protocol)
            eventually(lambda protocol=protocol: "read" in protocol.timers)
            assert protocol in state.waiting
        eventually(lambda protocol=protocol: protocol not in state.waiting)


def test_connections_that_cannot_be_accepted_are_logged_once_in_a_while(
    engines: dict[str, Engine], caplog: pytest.LogCaptureFixture
) -> None:
    context = {"message": "socket.accept() out of system resource", "exception": OSError(24, "x")}
    with running(engines) as served:
        loop = served.worker._loop
        for _ in range(1000):
            loop.call_soon_threadsafe(loop.call_exception_handler, context)
        loop.call_soon_threadsafe(loop.call_exception_handler, {"message": "another one"})
        assert health(served).status_code == 200
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if "accept" in m] == [
        "Connections cannot be accepted: [Errno 24] x."
    ]
    assert "another one" in messages


def test_as_many_connections_as_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, connections in ((128, 64), (10**6, 1024), (network.resource.RLIM_INFINITY, 1024)):
        monkeypatch.setattr(network.resource, "getrlimit", lambda _, files=files: (files, files))
        assert network.max_connections() == connections
