from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from patience import eventually, limit

from minigpt.cli.serve import paths_by_name
from minigpt.serve import network

Minigpt = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "sft" / "hf"
    tiny.model("qwen3", max_position_embeddings=2048).save_pretrained(directory)
    tiny.tokenizer(directory)
    return directory


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def health(client: httpx.Client) -> Any:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").json()


@pytest.mark.parametrize(("sent", "status"), [("SIGTERM", 0), ("SIGHUP", 0), ("SIGINT", 130)])
def test_serving_until_a_signal_comes(
    minigpt: Minigpt, model: Path, monkeypatch: pytest.MonkeyPatch, sent: str, status: int
) -> None:
    monkeypatch.delenv("MINIGPT_API_KEY", raising=False)
    url = f"http://127.0.0.1:{free_port()}"
    observed: dict[str, Any] = {}

    def visit() -> None:
        try:
            ask()
        except BaseException:
            if "stopped" not in observed:  # or the server would go on for ever
                os.kill(os.getpid(), getattr(signal, sent))
            raise

    def ask() -> None:
        body = {"model": "b", "prompt": "the", "max_tokens": 1000, "stream": True}
        with httpx.Client(base_url=url, timeout=limit(60)) as client:
            observed["health"] = eventually(lambda: health(client))
            listed = client.get("/v1/models").json()["data"]
            observed["models"] = {one["id"]: one["max_model_len"] for one in listed}
            observed["long"] = client.post("/v1/completions", json=body | {"prompt": [5] * 1100})
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                observed["stopped"] = True
                os.kill(os.getpid(), getattr(signal, sent))
                observed["last"] = [line for line in lines if line][-1]

    monkeypatch.setattr(network, "GRACE", limit(60))  # what was begun ends within it
    visitor = threading.Thread(target=visit)
    visitor.start()
    models = [f"a={model}", f"b={model.parent}"]
    options = ["--port", url.rpartition(":")[2], "--max_context", "1100"]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under `nohup`
    try:
        outcome = minigpt("serve", *models, *options)
    finally:
        signal.signal(signal.SIGHUP, before)
    visitor.join()
    assert outcome.status == status
    assert outcome.out == f"Serving a, b at {url} (Ctrl-C stops)\n"
    assert outcome.err == ("minigpt: interrupted\n" if status else "")
    assert observed["health"] == {"status": "ok"}
    assert observed["models"] == {"a": 1100, "b": 1100}
    assert observed["long"].status_code == 400
    assert observed["long"].json()["error"]["code"] == "context_length_exceeded"
    assert observed["last"] == "data: [DONE]"  # what was begun went on to its end


def test_a_hangup_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        network.Server, "run", lambda *_, **__: seen.append(signal.getsignal(signal.SIGHUP))
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        nothing: Any = None
        network.run(nothing, nothing, nothing)
        assert [*seen, signal.getsignal(signal.SIGHUP)] == [signal.SIG_IGN] * 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_names() -> None:
    assert paths_by_name(["outputs/nowhere", "Qwen/Qwen3-0.6B", "x=a=b"]) == {
        "outputs/nowhere": "outputs/nowhere",  # it is no directory here
        "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
        "x": "a=b",
    }


def test_names_of_directories_with_an_equals_sign(tmp_path: Path) -> None:
    directory = tmp_path / "lr=0.1"
    directory.mkdir()
    assert paths_by_name([str(directory)]) == {"lr=0.1": str(directory)}
    assert paths_by_name([f"x={directory}"]) == {"x": str(directory)}


def test_names_of_directories(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paths_by_name([str(model)]) == {"sft": str(model)}
    assert paths_by_name([str(model.parent)]) == {"sft": str(model.parent)}
    monkeypatch.chdir(model.parent)
    assert paths_by_name(["."]) == {"sft": "."}


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        ([], ["required: [NAME=]MODEL", "minigpt serve --help"]),
        (["./none"], ["no trained model in ./none", "minigpt fit"]),
        (["x=a", "x=b"], ["name of its own", "NAME=MODEL for x=b"]),
        (["=a"], ["name of its own"]),
        ([f"{'x' * 257}=a"], ["at most 256 characters", "NAME=MODEL"]),
        (["x" * 5000], ["at most 256 characters", "NAME=MODEL"]),
        (["a\nb=a"], ["can be printed", "'a\\nb=a'"]),
        (["a", "--slots", "0"], ["--slots", "at least 1"]),
        (["a", "--port", "70000"], ["--port 70000", "65535"]),
        (["a", "--host", "0.0.0.0"], ["reached by others", "MINIGPT_API_KEY", "openssl"]),
        (["a", "--host", "::"], ["reached by others", "MINIGPT_API_KEY"]),
        (["a", "--host", "no such host"], ["Cannot listen on no such host"]),
    ],
)
def test_bad_input(
    minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch, args: list[str], fragments: list[str]
) -> None:
    monkeypatch.delenv("MINIGPT_API_KEY", raising=False)
    outcome = minigpt("serve", *args)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in outcome.err


@pytest.mark.parametrize("key", ["grün", "密钥", "two words", "a\x7f", "\udcff"])
def test_keys_that_clients_cannot_send(
    minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("MINIGPT_API_KEY", key)
    outcome = minigpt("serve", "a", "--port", 0)
    assert (outcome.status, outcome.out) == (2, "")
    assert "letters of ASCII" in outcome.err
    assert key not in outcome.err


def test_port_that_is_taken(minigpt: Minigpt) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outcome = minigpt("serve", "a", "--port", listener.getsockname()[1])
    assert outcome.status == 2
    assert "Choose another --port" in outcome.err


def test_host_of_others_with_a_key(minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT_API_KEY", "sesame")
    outcome = minigpt("serve", "./none", "--host", "0.0.0.0", "--port", 0)
    assert "no trained model in ./none" in outcome.err  # it got so far


def test_weights_that_a_model_cannot_have(minigpt: Minigpt, tmp_path: Path) -> None:
    tiny.model("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer(tmp_path / "gpt2")
    outcome = minigpt("serve", tmp_path / "gpt2", "--port", 0, "--weights", "int8")
    assert outcome.status == 2
    assert "int8 weights are for Qwen3 and Llama models" in outcome.err


def test_missing_extra(minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    outcome = minigpt("serve", "a", "--port", 0)
    assert outcome.status == 2
    assert "fastapi is missing: pip install 'minigpt[serve]'" in outcome.err
