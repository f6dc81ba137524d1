"""Tiny models that say what the tests want to see, and servers for them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tiny
import torch
from patience import eventually, limit

from minigpt.data.formats import Message
from minigpt.infer.engine import Engine
from minigpt.serve.app import create_app
from minigpt.serve.network import Server
from minigpt.serve.worker import Worker

ANSWER = (
    "你好，世界！🎉 A 👩‍🚀 says: 再见。"  # in the tiny tokenizer every character is several tokens
)
HTML = """<img src=x onerror="document.title='ran'"><script>document.title='ran'</script>"""
QUESTION = "the cat"


def recite(directory: Path, answer: str) -> Engine:
    """Teach a tiny model to answer `QUESTION` with a text."""
    model = tiny.model("qwen3", max_position_embeddings=512)
    model.save_pretrained(directory)
    tiny.tokenizer(directory)
    engine = Engine.load(directory)
    prompt = engine.encode([Message("user", QUESTION)])
    ids = torch.tensor([[*prompt, *engine.encode(answer), engine.tokenizer.eos_token_id]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=0.01)
    for _ in range(400):
        loss = engine.model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.005:
            break
    engine.model.save_pretrained(directory)
    return Engine.load(directory)


@dataclass
class Served:
    """A running server."""

    url: str
    worker: Worker
    http: httpx.Client
    server: Server

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=limit(60)
        )

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.http.get(self.url + path, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self.http.post(self.url + path, **more)

    def connect(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=limit(60))


@contextmanager
def running(
    engines: dict[str, Engine], slots: int = 8, max_queue: int = 256, **options: Any
) -> Iterator[Served]:
    """Serve models from a thread of this process."""
    worker = Worker(engines, slots, max_queue)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)  # soon full
        server = Server(create_app(worker, **options), worker)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        with httpx.Client(timeout=limit(60), verify=False) as http:  # there is nothing to verify
            served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", worker, http, server)
            try:
                eventually(lambda: server.started)
                yield served
            finally:
                served.client.close()
                server.should_exit = True
                thread.join(limit(60))
    assert not worker.alive


@contextmanager
def slow_reading(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> Iterator[threading.Event]:
    """Prompts of `base` are not encoded before the event."""
    go = threading.Event()
    read = engines["base"].encode
    monkeypatch.setattr(engines["base"], "encode", lambda text: go.wait() and read(text))
    try:
        yield go
    finally:
        go.set()
