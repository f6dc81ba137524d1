"""One request never touches another's answer, and one model's prompts never hold up another's."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import eventually
from pydantic import ValidationError
from serving import ANSWER, QUESTION, Served, running, slow_reading
from starlette.requests import ClientDisconnect, Request

from minigpt.data import template_process
from minigpt.infer import continuous_batch
from minigpt.infer.engine import Engine
from minigpt.infer.sampling import Sampler
from minigpt.serve import app, network
from minigpt.serve.schema import ChatRequest, TextRequest

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
HONEST = [
    {"model": "base", "prompt": QUESTION, "max_tokens": 10, "temperature": 1.0, "seed": seed}
    for seed in range(6)
]


def ask(served: Served, body: dict[str, Any]) -> tuple[int, str]:
    """Ask for a stream; return the status, and the stream without what differs by chance."""
    path = TEXTS if "prompt" in body else CHATS
    answer = served.post(path, json=body | {"stream": True})
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    compared = [{name: chunk.get(name) for name in ("choices", "error")} for chunk in chunks]
    return answer.status_code, json.dumps(compared)


def beside_honest(served: Served, body: dict[str, Any]) -> tuple[list[Any], tuple[int, str]]:
    """Ask while six others do; return their answers, and that to it."""
    with ThreadPoolExecutor(7) as clients:
        honest = [clients.submit(ask, served, one) for one in HONEST]
        answer = clients.submit(ask, served, body)
        return [one.result() for one in honest], answer.result()


@pytest.fixture(scope="module")
def alone(served: Served) -> list[Any]:
    return [ask(served, body) for body in HONEST]


LIMITS = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 2**70),
    "min_p": st.floats(0, 1, exclude_max=True),
    "repetition_penalty": st.floats(0.01, 10),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 16),
    "stop": st.lists(st.text(min_size=1, max_size=256), max_size=16),
}
TEXT = st.text(max_size=40)
TEXT_REQUESTS = st.fixed_dictionaries(
    {"model": st.just("base"), "max_tokens": st.integers(1, 6)},
    optional=LIMITS | {"logprobs": st.integers(0, 20)},
).flatmap(
    lambda body: st.one_of(
        TEXT, st.lists(TEXT, min_size=1, max_size=3), st.lists(st.integers(0, 319), min_size=1)
    ).map(lambda prompt: body | {"prompt": prompt})
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": TEXT}
)
CHAT_REQUESTS = st.fixed_dictionaries(
    {
        "model": st.just("sft"),
        "max_completion_tokens": st.integers(1, 6),
        "messages": st.lists(MESSAGE, min_size=1, max_size=3),
    },
    optional=LIMITS,
)


def test_accepted_requests_leave_the_answers_beside_them_as_they_are(
    served: Served, alone: list[Any]
) -> None:
    statuses = set()

    @settings(max_examples=25, database=None)
    @given(TEXT_REQUESTS | CHAT_REQUESTS)
    def hold(body: dict[str, Any]) -> None:
        honest, (status, answer) = beside_honest(served, body)
        assert honest == alone
        statuses.add(status)
        assert status == 200, answer
        assert '"error": {' not in answer

    hold()
    assert statuses == {200}


def test_row_without_a_distribution_fails_alone(
    served: Served, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = continuous_batch.sample

    def damaged(logits: torch.Tensor, samplers: list[Sampler]) -> list[int | None]:
        logits = logits.clone()
        for row, sampler in enumerate(samplers):
            if sampler.sampling.seed == 99:
                logits[row, 7] = float("nan")
        return sample(logits, samplers)

    monkeypatch.setattr(continuous_batch, "sample", damaged)
    body = HONEST[0] | {"seed": 99}
    honest, (_, stream) = beside_honest(served, body)
    assert honest == alone
    assert "logits are not finite" in stream
    answer = served.post(TEXTS, json=body)
    assert answer.status_code == 500
    assert "logits are not finite" in answer.json()["error"]["message"]


class PanicException(BaseException):
    """As `tokenizers` raises it."""


@pytest.mark.parametrize("kind", [ValueError, PanicException])
def test_tokenizer_that_fails_ends_its_request_alone(
    served: Served, alone: list[Any], monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    engine = served.worker.engines["base"]
    encode = engine.encode

    def failing(prompt: str) -> list[int]:
        if prompt == "fail":
            raise kind("index out of bounds")
        return encode(prompt)

    monkeypatch.setattr(engine, "encode", failing)
    honest, (status, _) = beside_honest(served, HONEST[0] | {"prompt": "fail"})
    assert (honest, status) == (alone, 500)
    answer = served.post(TEXTS, json=HONEST[0] | {"prompt": "fail"})
    assert "tokenizer failed on this prompt" in answer.json()["error"]["message"]


# Endless, empty, huge or refusing, by what the user says; else as ours.
HOSTILE = """{%- set asked = messages[0].content -%}
{%- if asked == 'loop' -%}
{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif asked == 'memory' -%}{{ 'x' * 10**11 }}
{%- elif asked == 'long' -%}{{ 'x' * 10**6 }}
{%- elif asked == 'refuse' -%}{{ raise_exception('no such chats') }}
{%- elif asked != 'empty' -%}
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
{%- endif -%}"""


@pytest.fixture
def hostile(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server of a model whose template does not come to an end, and of `sft`."""
    monkeypatch.setattr(template_process, "CPU_SECONDS", 0.5)
    tokenizer = copy.deepcopy(engines["sft"].tokenizer)
    tokenizer.chat_template = HOSTILE
    model = Engine(engines["sft"].model, tokenizer)
    with running({"hostile": model, "sft": engines["sft"]}) as served:
        yield served


def chat(model: str, content: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
    }


def test_template_that_does_not_end_stops_its_own_request_alone(hostile: Served) -> None:
    words = {
        "loop": "more than 0.5 seconds of processor time",
        "memory": "MemoryError",
        "long": f"more than {hostile.worker.encoders['hostile'].max_characters} characters",
        "refuse": "no such chats",
        "empty": "writes nothing for this chat",
    }
    with ThreadPoolExecutor(6) as clients:
        asked = {
            name: clients.submit(hostile.post, CHATS, json=chat("hostile", name)) for name in words
        }
        other = clients.submit(hostile.post, CHATS, json=chat("sft", QUESTION)).result().json()
        assert other["choices"][0]["message"]["content"] == ANSWER
        for name, answer in asked.items():
            assert answer.result().status_code == 400
            assert words[name] in answer.result().json()["error"]["message"]
    again = hostile.post(CHATS, json=chat("hostile", QUESTION)).json()
    assert again["choices"][0]["message"]["content"] == ANSWER


def test_a_users_message_opens_no_turn_in_a_template_of_others(
    hostile: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tiny.recorded_prompts(monkeypatch)
    body = chat("hostile", tiny.FORGED) | {"max_tokens": 2}
    assert hostile.post(CHATS, json=body).status_code == 200
    tokenizer = hostile.worker.engines["hostile"].tokenizer
    assert prompts == [tiny.asked_as_text(tokenizer, tiny.FORGED)]


def test_server_stops_while_a_template_goes_on(
    hostile: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "CPU_SECONDS", 10_000)
    monkeypatch.setattr(network, "GRACE", 0.2)
    hostile.server.config.timeout_graceful_shutdown = 600
    hostile.post(CHATS, json=chat("hostile", "loop"))  # the process of half a second ends
    with ThreadPoolExecutor(1) as clients:
        answer = clients.submit(hostile.post, CHATS, json=chat("hostile", "loop"))
        eventually(lambda: hostile.worker.load("hostile") == 1)
        hostile.server.should_exit = True
        assert answer.result().status_code == 503
        eventually(lambda: not hostile.worker.alive)


def test_server_stops_while_prompts_are_encoded(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "GRACE", 0.2)
    with (
        running(engines) as served,
        ThreadPoolExecutor(1) as clients,
        slow_reading(engines, monkeypatch),
    ):
        served.server.config.timeout_graceful_shutdown = 600
        waiting = clients.submit(served.post, TEXTS, json=HONEST[0])
        eventually(lambda: served.worker.load("base") == 1)
        served.server.should_exit = True
        answer = waiting.result()
        assert answer.status_code == 503
        assert "was stopped" in answer.json()["error"]["message"]
        eventually(lambda: not served.worker.alive)


def test_prompts_of_one_model_hold_up_no_other(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        running(engines) as served,
        ThreadPoolExecutor(1) as clients,
        slow_reading(engines, monkeypatch) as go,
    ):
        waiting = clients.submit(served.post, TEXTS, json=HONEST[0])
        eventually(lambda: served.worker.load("base") == 1)
        answer = served.post(CHATS, json=chat("sft", QUESTION)).json()
        assert answer["choices"][0]["message"]["content"] == ANSWER
        assert not waiting.done()
        go.set()
        assert waiting.result().status_code == 200


def test_clients_that_leave_have_nothing_encoded(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    encode = engines["base"].encode
    monkeypatch.setattr(engines["base"], "encode", lambda text: read.append(text) or encode(text))
    body = json.dumps(HONEST[0]).encode()
    head = f"POST {TEXTS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with running(engines) as served, slow_reading(engines, monkeypatch) as go:
        connections = [served.connect() for _ in range(5)]
        for connection in connections:
            connection.sendall(request)
        eventually(lambda: served.worker.load("base") == 5)
        for connection in connections:
            connection.close()
        eventually(lambda: served.worker.load("base") == 0)
        go.set()
        assert served.post(TEXTS, json=HONEST[0]).status_code == 200
    assert len(read) == 2  # the one that was being encoded, and the last


def request_of(content: bytes, leaves: bool = False) -> Request:
    """Return a request with a body, whose client stays, or leaves at once."""
    messages = [{"type": "http.request", "body": content}]
    messages += [{"type": "http.disconnect"}] * leaves

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Future()

    headers = [(b"content-type", b"application/json")]
    return Request({"type": "http", "method": "POST", "headers": headers}, receive)


def test_long_bodies_are_parsed_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "PAUSE_RATIO", 1e9)
    short = json.dumps(HONEST[0]).encode()
    long = short + b" " * app.LONG_BODY

    async def read() -> None:
        bodies = app.BodyReader()
        never = asyncio.get_running_loop().time() + 1e6
        assert (await bodies.read(request_of(long), TextRequest, never)).prompt == QUESTION
        second = asyncio.create_task(bodies.read(request_of(long), TextRequest, never))
        with pytest.raises(ClientDisconnect):
            await bodies.read(request_of(long, leaves=True), TextRequest, never)
        with pytest.raises(TimeoutError):
            await bodies.read(request_of(long), TextRequest, 0.0)
        assert (await bodies.read(request_of(short), TextRequest, never)).prompt == QUESTION
        assert not second.done()
        bodies._parsing_lock.release()  # as the end of the pause does
        assert (await second).prompt == QUESTION

    asyncio.run(read())


JUNK = st.sampled_from([None, -1, 1.5, "x", True, {}, [], [-1], {"type": "text"}, {"role": "x"}])
FIELDS = [*TextRequest.model_fields, *ChatRequest.model_fields, "x"]


def count_errors(kind: type[TextRequest | ChatRequest], body: dict[str, object]) -> int:
    try:
        kind.model_validate(body)
    except ValidationError as error:
        return error.error_count()
    return 0


@given(
    kind=st.sampled_from([TextRequest, ChatRequest]),
    field=st.sampled_from(FIELDS),
    junk=JUNK,
    nested=st.booleans(),
)
def test_no_body_makes_many_errors(
    kind: type[TextRequest | ChatRequest], field: str, junk: object, nested: bool
) -> None:
    """The time to find them, and the memory that they take, are the server's."""
    many: list[object] = [junk] * 1000
    fields = {str(key): junk for key in range(1000)}
    message = {"role": "user", "content": many}
    for value in (many, [many] * 1000 if nested else fields, [message] * 50, [fields] * 50):
        body = {"model": "base", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
        assert count_errors(kind, body | {field: value}) < 150
