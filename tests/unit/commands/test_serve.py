from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny

from minigpt.commands.serve import named

Minigpt = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served") / "sft" / "hf"
    tiny.model("qwen3", max_position_embeddings=2048).save_pretrained(place)
    tiny.tokenizer(place)
    return place


@pytest.fixture(scope="module")
def processes(model: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two servers, started together, as each takes seconds to load its libraries."""
    environment = {k: v for k, v in os.environ.items() if k != "MINIGPT_API_KEY"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "minigpt", "serve", *models, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for models in ([str(model)], [f"a={model}", f"b={model.parent}"])
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("index", "sent", "status"), [(0, "SIGTERM", 0), (1, "SIGINT", 130)])
def test_serving_until_a_signal_comes(
    processes: list[subprocess.Popen[str]], index: int, sent: str, status: int
) -> None:
    process = processes[index]
    assert process.stdout
    line = process.stdout.readline()
    names = [["sft"], ["a", "b"]][index]
    assert line.startswith(f"Serving {', '.join(names)} at http://127.0.0.1:")
    url = line.split()[-3]
    with httpx.Client(base_url=url, timeout=30) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [one["id"] for one in listed] == names
        body = {"model": names[0], "prompt": "the", "max_tokens": 2000, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(getattr(signal, sent))
            assert any("data:" in told for told in lines)  # it goes on to an end
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert errors == ("minigpt: interrupted\n" if status else "")


def test_names() -> None:
    assert named(["outputs/sft", "Qwen/Qwen3-0.6B", "x=a=b"]) == {
        "outputs/sft": "outputs/sft",  # it is no directory here
        "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
        "x": "a=b",
    }


def test_names_of_directories(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert named([str(model)]) == {"sft": str(model)}
    assert named([str(model.parent)]) == {"sft": str(model.parent)}
    monkeypatch.chdir(model.parent)
    assert named(["."]) == {"sft": "."}


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        ([], ["required: [NAME=]MODEL", "minigpt serve --help"]),
        (["./none"], ["no trained model in ./none", "minigpt fit"]),
        (["x=a", "x=b"], ["name of its own", "NAME=MODEL for x=b"]),
        (["=a"], ["name of its own"]),
        (["a", "--slots", "0"], ["--slots", "at least 1"]),
        (["a", "--port", "70000"], ["Cannot listen on 127.0.0.1 port 70000", "--port"]),
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


def test_port_that_is_taken(minigpt: Minigpt) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = minigpt("serve", "a", "--port", taken.getsockname()[1])
    assert outcome.status == 2
    assert "Choose another --port" in outcome.err


def test_host_of_others_with_a_key(minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT_API_KEY", "sesame")
    outcome = minigpt("serve", "./none", "--host", "0.0.0.0", "--port", 0)
    assert "no trained model in ./none" in outcome.err  # it got so far


def test_missing_extra(minigpt: Minigpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    outcome = minigpt("serve", "a", "--port", 0)
    assert outcome.status == 2
    assert "fastapi is missing: pip install 'minigpt[serve]'" in outcome.err
