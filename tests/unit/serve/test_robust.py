"""Nothing that a client sends, or fails to send, stops the server."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import eventually, limit
from prometheus_client.parser import text_string_to_metric_families
from serving import ANSWER, QUESTION, Served, running, slow_reading

from minigpt.infer.continuous_batch import ContinuousBatch
from minigpt.infer.engine import Engine
from minigpt.infer.native import NativeDecoder
from minigpt.serve import app, middleware, network
from minigpt.serve.worker import STOPPED

CHAT: dict[str, Any] = {
    "model": "sft",
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
}
LONG: dict[str, Any] = {
    "model": "base",
    "prompt": QUESTION,
    "max_tokens": 4000,
    "temperature": 0,
    "stream": True,
}
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(autouse=True)
def _server_is_well(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test the server that the module shares answers and holds no place."""
    yield
    if "served" in request.fixturenames:
        served: Served = request.getfixturevalue("served")
        eventually(lambda: not served.worker.completions)
        answer = served.post(CHATS, json=CHAT).json()
        assert answer["choices"][0]["message"]["content"] == ANSWER
        assert all(batch.idle for batch in served.worker.batches.values())


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


TURN = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("path", "more", "status", "code", "param", "words"),
    [
        (CHATS, {"model": "none"}, 404, "model_not_found", "model", "Served: base, sft, html"),
        (CHATS, {"model": "base"}, 400, "no_chat_template", "model", "/v1/completions"),
        (CHATS, {"model": 3}, 400, None, "model", "valid string"),
        (CHATS, {"model": None}, 400, None, "model", "required"),
        (CHATS, {"messages": []}, 400, None, "messages", "at least 1"),
        (CHATS, {"messages": [TURN] * 1025}, 400, None, "messages", "at most 1024"),
        (CHATS, {"messages": [{"role": "tool", "content": "x"}]}, 400, None, "messages", "'user'"),
        (CHATS, {"messages": [{"role": "user"}]}, 400, None, "messages", "messages.0.content"),
        (CHATS, {"messages": [TURN | {"content": "the " * 600}]}, 400,
         "context_length_exceeded", "messages", "maximum context length is 512"),
        (CHATS, {"messages": [TURN | {"content": "\ud800"}]}, 400, "invalid_json", None, "escape"),
        (CHATS, {"messages": [TURN | {"content": "x" * 900_000}]}, 400,
         "context_length_exceeded", "messages", "has 900000 characters"),
        (CHATS, {"temperature": "0"}, 400, None, "temperature", "valid number"),
        (CHATS, {"temperature": 2.1}, 400, None, "temperature", "less than or equal to 2"),
        (CHATS, {"top_p": 0}, 400, None, "top_p", "greater than 0"),
        (CHATS, {"min_p": 1}, 400, None, "min_p", "less than 1"),
        (CHATS, {"n": 17}, 400, None, "n", "less than or equal to 16"),
        (
            CHATS,
            {"repetition_penalty": 1e-38},
            400,
            None,
            "repetition_penalty",
            "greater than or equal to 0.01",
        ),
        (CHATS, {"max_tokens": 0}, 400, None, "max_tokens", "equal to 1"),
        (CHATS, {"seed": 2**63}, 400, None, "seed", "less than"),
        (CHATS, {"stop": [""]}, 400, None, "stop", "at least 1"),
        (CHATS, {"stream_options": {}}, 400, None, None, "'stream' to be true"),
        (CHATS, {"top_logprobs": 1}, 400, None, None, "'logprobs' to be true"),
        (CHATS, {"tools": [{"type": "function"}]}, 400, None, "tools", "not supported"),
        (CHATS, {"tool_choice": "required"}, 400, None, "tool_choice", "not supported"),
        (CHATS, {"modalities": ["text", "audio"]}, 400, None, "modalities", "not supported"),
        (CHATS, {"temprature": 1}, 400, None, "temprature", "not supported"),
        (TEXTS, {"prompt": []}, 400, None, "prompt", "prompt."),
        (TEXTS, {"prompt": [0, 10**6]}, 400, None, "prompt", "below"),
        (TEXTS, {"prompt": [0] * 5000}, 400, "context_length_exceeded", "prompt", "has 5000"),
        (TEXTS, {"prompt": "x" * 900_000}, 400, "context_length_exceeded", "prompt", "has 900000"),
        (TEXTS, {"prompt": [-1] * 250_000}, 400, None, "prompt", "greater than or equal to 0"),
        (TEXTS, {"prompt": [{}] * 250_000}, 400, None, "prompt", "prompt."),
        (TEXTS, {str(key): 0 for key in range(70_000)}, 400, None, None, "at most 64 fields"),
        (TEXTS, {"prompt": "a", "n": 16, "logprobs": 20, "max_tokens": 4000}, 400,
         None, "logprobs", "or stream"),
        (TEXTS, {"prompt": "a", "echo": True}, 400, None, "echo", "not supported"),
        ("/v1/embeddings", {}, 404, None, None, "Not Found"),
        ("/health", {}, 405, None, None, "Not Allowed"),
    ],
)  # fmt: skip
def test_what_is_refused(
    served: Served,
    path: str,
    more: dict[str, Any],
    status: int,
    code: str | None,
    param: str | None,
    words: str,
) -> None:
    default = CHAT if path == CHATS else {"model": "base"} if path == TEXTS else {}
    answer = served.post(path, content=json.dumps(default | more), headers=JSON)
    assert answer.status_code == status
    error = error_of(answer)
    assert (error["code"], error["param"]) == (code, param)
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"model": "sft"' + b" " * 100]
)
def test_bad_json(served: Served, body: bytes) -> None:
    answer = served.post(CHATS, content=body, headers=JSON)
    assert answer.status_code == 400
    assert error_of(answer)["message"]


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {}])
def test_body_of_another_kind_is_refused(served: Served, headers: dict[str, str]) -> None:
    """A page elsewhere can send plain text to this server without asking it first."""
    answer = served.post(CHATS, content=json.dumps(CHAT), headers=headers)
    assert answer.status_code == 400
    assert "Content-Type: application/json" in error_of(answer)["message"]


FIELDS = [
    *CHAT,
    "prompt",
    "stop",
    "n",
    "seed",
    "top_k",
    "stream",
    "logprobs",
    "stream_options",
    "x",
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=8)
    | st.sampled_from([math.nan, math.inf, 2**64, -(2**63), "\ud83d", "sft", "base", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner, max_size=3)
    ),
    max_leaves=6,
)
CHANGES = st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=64))
    body = json.dumps(CHAT | {"prompt": "a", "max_tokens": 2} | draw(CHANGES)).encode()
    cut = draw(st.one_of(st.none(), st.integers(0, len(body))))
    return body[:cut]


def test_malformed_bodies(served: Served) -> None:
    statuses = set()

    @settings(max_examples=500, database=None)
    @given(st.sampled_from([CHATS, TEXTS]), bodies())
    def ask(path: str, body: bytes) -> None:
        answer = served.post(path, content=body, headers=JSON)
        statuses.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (answer.status_code, body)
        if answer.status_code != 200:
            assert error_of(answer)["message"]

    ask()
    assert 400 in statuses


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ],
)
def test_what_is_no_request(served: Served, sent: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(sent)
        assert connection.recv(100).startswith(b"HTTP/1.1 ")


def test_client_that_leaves_frees_its_place(served: Served, client: openai.OpenAI) -> None:
    for _ in range(3):
        streams = [client.completions.create(**LONG) for _ in range(12)]  # more than the slots
        for stream in streams[:8]:
            next(iter(stream))
        assert served.worker.load("base") == 12
        for stream in streams:
            stream.close()
        eventually(lambda: served.worker.load("base") == 0)
    eventually(lambda: served.worker.batches["base"].idle)


def test_client_that_leaves_before_a_whole_answer(served: Served) -> None:
    body = json.dumps(LONG | {"stream": False, "n": 3}).encode()
    head = f"POST {TEXTS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with served.connect() as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: served.worker.load("base") == 3)
    eventually(lambda: served.worker.load("base") == 0)
    eventually(lambda: served.worker.batches["base"].idle)
    assert served.worker.completions == set()


def test_body_that_never_ends(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for sent in (b"", head[:30], head + b"Content-Length: 100\r\n\r\n{"):
        with monkeypatch.context() as only:
            only.setattr(network, "CLIENT_TIMEOUT", 0.2)
            with served.connect() as connection:
                connection.sendall(sent)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""


def test_slow_reader_holds_up_nobody(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = network.Protocol.pause_writing

    def soon_cut_off(protocol: network.Protocol) -> None:
        with pytest.MonkeyPatch.context() as only:
            only.setattr(network, "CLIENT_TIMEOUT", 0.2)
            pause(protocol)

    monkeypatch.setattr(network.Protocol, "pause_writing", soon_cut_off)
    body = json.dumps(LONG | {"n": 4, "logprobs": 20, "max_tokens": 100}).encode()
    head = f"POST {TEXTS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(engines) as served, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: served.worker.load("base") == 4)
        answer = served.post(CHATS, json=CHAT).json()  # while the other does not read
        assert answer["choices"][0]["message"]["content"] == ANSWER
        address = connection.getsockname()
        eventually(
            lambda: address not in [at.client for at in served.server.server_state.connections]
        )
        eventually(lambda: served.worker.load("base") == 0)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(2**16):
                received += part
        assert b"[DONE]" not in received  # it was cut off


def test_body_limit(engines: dict[str, Engine]) -> None:
    with running(engines, max_body=2000) as served:
        for content in (b" " * 2001, iter([b" " * 1500] * 2)):
            answer = served.post(CHATS, content=content, headers=JSON)
            assert answer.status_code == 413
            assert "2000 bytes" in error_of(answer)["message"]
        assert served.post(CHATS, json=CHAT).status_code == 200


def test_limit_of_all_bodies(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_BODIES", 3)
    monkeypatch.setattr(network, "CLIENT_TIMEOUT", 10_000)
    content = json.dumps(CHAT | {"max_tokens": 1}).encode().ljust(1900)
    head = f"POST {CHATS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running(engines, max_body=2000) as served, contextlib.ExitStack() as stack:
        assert served.post(CHATS, content=content, headers=JSON).status_code == 200

        def refused() -> bool:
            """Leave one more body unfinished, and ask: three of them leave no room."""
            connection = stack.enter_context(served.connect())
            connection.sendall(f"{head}Content-Length: 2000\r\n\r\n".encode() + content)
            return served.post(CHATS, content=content, headers=JSON).status_code == 503

        eventually(refused)
        stack.close()
        eventually(lambda: served.post(CHATS, content=content, headers=JSON).status_code == 200)


def test_key(engines: dict[str, Engine]) -> None:
    with running(engines, key="sesame ä") as served:
        for key_header in (None, "Bearer", "Bearer wrong", "Basic sesame", "Bearer \xff"):
            headers = {} if key_header is None else {"authorization": key_header.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                answer = served.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert error_of(answer)["code"] == "invalid_api_key"
        assert served.get("/").status_code == served.get("/health").status_code == 200
        named = {"authorization": "Bearer sesame ä".encode(), "host": "example.org"}
        assert served.get("/v1/models", headers=named).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            served.client.models.list()


def test_open_server_answers_to_loopback_names_only(served: Served) -> None:
    for host, status in {
        "evil.example": 403,
        "localhost.evil.example:80": 403,
        "127.evil.example": 403,
        "localhost": 200,
        "LOCALHOST:1": 200,
        "127.0.0.1:9": 200,
        "[::1]:8000": 200,
    }.items():
        assert served.get("/v1/models", headers={"host": host}).status_code == status


def test_full_queue(engines: dict[str, Engine]) -> None:
    with running(engines, slots=2, max_queue=1) as served:
        client = served.client
        streams = [client.completions.create(**LONG) for _ in range(3)]
        with pytest.raises(openai.RateLimitError, match="The queue is full") as caught:
            client.completions.create(**LONG)
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"
        streams.pop().close()
        eventually(lambda: served.worker.load("base") == 2)
        streams.append(client.completions.create(**LONG))
        with pytest.raises(openai.BadRequestError, match="more than 3"):
            client.completions.create(**LONG, n=4)
        for stream in streams:
            stream.close()


def test_prompts_that_are_read_take_places(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = LONG | {"stream": False, "max_tokens": 2}
    with (
        running(engines, slots=2, max_queue=1) as served,
        ThreadPoolExecutor(3) as clients,
        slow_reading(engines, monkeypatch) as go,
    ):
        waiting = [clients.submit(served.post, TEXTS, json=body) for _ in range(3)]
        eventually(lambda: served.worker.load("base") == 3)
        assert served.post(TEXTS, json=body).status_code == 429
        go.set()
        assert [one.result().status_code for one in waiting] == [200] * 3
        assert served.worker.load("base") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_time_limit_of_prompts_that_are_read(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with running(engines, timeout=0.3) as served, slow_reading(engines, monkeypatch):
        answer = served.post(TEXTS, json=LONG | {"stream": stream})
        assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")
        assert served.worker.load("base") == 0


def test_time_limit_of_bodies_that_wait(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "PAUSE_RATIO", 1e9)
    long = json.dumps(LONG).encode() + b" " * app.LONG_BODY
    headers = {"content-type": "application/json"}
    with running(engines, timeout=0.3) as served:
        served.post(TEXTS, content=long, headers=headers)  # after which long ones wait
        answer = served.post(TEXTS, content=long, headers=headers)
        assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")


def test_time_limit(engines: dict[str, Engine]) -> None:
    with running(engines, timeout=0.3) as served:
        client = served.client
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**LONG | {"stream": False})
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(client.completions.create(**LONG))
        eventually(lambda: served.worker.load("base") == 0)


def test_model_that_breaks(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    step: Callable[[ContinuousBatch], Any] = ContinuousBatch.step
    broken: list[bool] = []

    def failing(self: ContinuousBatch) -> Any:
        if self.engine is engines["base"] and not broken:
            broken.append(True)
            raise RuntimeError("out of memory")
        return step(self)

    monkeypatch.setattr(ContinuousBatch, "step", failing)
    with running(engines) as served:
        client = served.client
        with pytest.raises(openai.InternalServerError, match="failed on this request"):
            client.completions.create(**LONG | {"stream": False})
        assert served.worker.load("base") == 0
        broken.clear()
        with pytest.raises(openai.APIError, match="failed on this request"):
            list(client.completions.create(**LONG))
        client.completions.create(**LONG | {"stream": False, "max_tokens": 3})


def test_model_that_cannot_go_on(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(engines) as served:

        def failing(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(ContinuousBatch, "step", failing)
        monkeypatch.setattr("minigpt.serve.worker.ContinuousBatch", failing)
        answer = served.post(TEXTS, json=LONG | {"stream": False})
        assert (answer.status_code, error_of(answer)["code"]) == (500, "server_error")
        assert served.get("/health").status_code == 503
        for path, body in ((TEXTS, LONG), (CHATS, CHAT)):
            answer = served.post(path, json=body)
            assert answer.status_code == 503
            assert "Restart it" in error_of(answer)["message"]
    assert "No answers are computed any more" in caplog.text


def test_answers_are_ended_when_the_server_stops(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "GRACE", 0.2)
    with running(engines) as served:
        served.server.config.timeout_graceful_shutdown = 600
        client = served.client
        stream = client.completions.create(**LONG)
        next(iter(stream))
        served.server.should_exit = True
        with pytest.raises(openai.APIError, match="The server was stopped"):
            list(stream)


def test_a_long_prompt_is_read_no_further_when_the_server_stops(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    pieces: list[int] = []
    read = NativeDecoder.read

    def blocked(self: NativeDecoder, tokens: list[int]) -> None:
        pieces.append(len(tokens))
        begun.set()
        go.wait(limit(60))
        read(self, tokens)

    monkeypatch.setattr(NativeDecoder, "read", blocked)
    monkeypatch.setattr(network, "GRACE", 0.2)
    with running(engines) as served, ThreadPoolExecutor(1) as clients:
        served.server.config.timeout_graceful_shutdown = 600
        body = LONG | {"prompt": [5] * 4000, "stream": False}
        waiting = clients.submit(served.post, TEXTS, json=body)
        assert begun.wait(limit(60))
        served.server.should_exit = True
        answer = waiting.result()
        assert (answer.status_code, error_of(answer)["message"]) == (503, STOPPED)
        go.set()
        eventually(lambda: not served.worker.alive)
    assert pieces == [512]


def test_health_and_metrics(engines: dict[str, Engine]) -> None:
    with running(engines) as served:
        assert served.get("/health").json() == {"status": "ok"}
        usage = served.post(CHATS, json=CHAT).json()["usage"]
        served.get("/nowhere/at/all")
        families = text_string_to_metric_families(served.get("/metrics").text)
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }
    assert samples["minigpt_requests_total", CHATS, "200"] == 1
    assert samples["minigpt_requests_total", "other", "404"] == 1
    assert samples["minigpt_prompt_tokens_total", "sft"] == usage["prompt_tokens"]
    assert samples["minigpt_generated_tokens_total", "sft"] == usage["completion_tokens"]
    assert samples["minigpt_first_token_seconds_count", "sft"] == 1
    assert samples["minigpt_request_seconds_count", CHATS] == 1
    assert samples["minigpt_load_sequences", "sft"] == 0
