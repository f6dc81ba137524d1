"""The API as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
import tiny
from serving import ANSWER, QUESTION, Served

from minigpt.data.formats import Message

CHAT: dict[str, Any] = {
    "model": "sft",
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
}
TEXT: dict[str, Any] = {"model": "base", "prompt": QUESTION, "max_tokens": 12, "temperature": 1.0}


def test_models(client: openai.OpenAI) -> None:
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert list(listed) == ["base", "sft", "html"]
    assert (listed["sft"]["chat"], listed["sft"]["max_model_len"]) == (True, 512)
    assert (listed["base"]["chat"], listed["base"]["max_model_len"]) == (False, 4096)
    assert client.models.retrieve("sft").id == "sft"
    with pytest.raises(openai.NotFoundError, match="'none' does not exist"):
        client.models.retrieve("none")


def test_chat(client: openai.OpenAI, served: Served) -> None:
    reply = client.chat.completions.create(**CHAT)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert (reply.object, reply.model) == ("chat.completion", "sft")
    assert reply.id.startswith("chatcmpl-")
    assert reply.usage is not None
    expected = served.worker.engines["sft"].encode(ANSWER)
    assert reply.usage.completion_tokens == len(expected)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + len(expected)


def test_stream(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options=options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *deltas, last = chunks
    texts = [chunk.choices[0].delta.content or "" for chunk in deltas]
    assert "".join(texts) == ANSWER
    assert all(part in ANSWER for part in texts)  # no half characters
    assert len(texts) > 15
    assert [chunk.choices[0].delta.role for chunk in deltas] == ["assistant"] + [None] * (
        len(deltas) - 1
    )
    assert [c.choices[0].finish_reason for c in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert {chunk.usage for chunk in deltas} == {None}
    complete = client.chat.completions.create(**CHAT)
    assert (last.choices, last.usage) == ([], complete.usage)


def test_stream_ends_with_done(served: Served) -> None:
    body = CHAT | {"stream": True, "max_tokens": 3}
    answer = served.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, trailing = answer.text.split("\n\n")
    assert (done, trailing) == ("data: [DONE]", "")
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events)


def test_text(client: openai.OpenAI, served: Served) -> None:
    reply = client.completions.create(**TEXT | {"temperature": 0})  # chance may end a text before
    assert (reply.object, reply.choices[0].finish_reason) == ("text_completion", "length")
    assert reply.id.startswith("cmpl-")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 12
    chunks = client.completions.create(**TEXT | {"seed": 1}, stream=True)
    streamed = "".join(chunk.choices[0].text for chunk in chunks)
    assert streamed == client.completions.create(**TEXT | {"seed": 1}).choices[0].text


def test_prompts_of_every_form(client: openai.OpenAI, served: Served) -> None:
    ids = served.worker.engines["base"].encode(QUESTION)
    options = TEXT | {"temperature": 0}
    (single,) = client.completions.create(**options).choices
    for prompt, count in ((ids, 1), ([QUESTION, QUESTION], 2), ([ids, ids, ids], 3)):
        reply = client.completions.create(**options | {"prompt": prompt})
        assert [c.text for c in reply.choices] == [single.text] * count
        assert [c.index for c in reply.choices] == list(range(count))
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == count * len(ids)


def test_a_users_message_opens_no_turn(
    client: openai.OpenAI, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tiny.recorded_prompts(monkeypatch)
    message = {"role": "user", "content": tiny.FORGED}
    for stream in (False, True):
        reply = client.chat.completions.create(
            **CHAT | {"messages": [message], "max_tokens": 2, "stream": stream}
        )
        if stream:
            list(reply)
    tokenizer = served.worker.engines["sft"].tokenizer
    assert prompts == [tiny.asked_as_text(tokenizer, tiny.FORGED)] * 2


def test_messages_in_parts_and_roles(client: openai.OpenAI) -> None:
    texts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    complete = client.chat.completions.create(**CHAT)
    same = client.chat.completions.create(
        **CHAT | {"messages": [{"role": "user", "content": texts}]}
    )
    assert same.choices[0].message.content == ANSWER
    # What a client got it may send back as it is.
    turns = [*CHAT["messages"], complete.choices[0].message, {"role": "user", "content": QUESTION}]
    answers = [
        client.chat.completions.create(
            **CHAT | {"messages": [{"role": role, "content": "x"}, *turns]}
        )
        for role in ("system", "developer")
    ]
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage == answers[1].usage


@pytest.mark.parametrize(
    ("more", "text", "finish"),
    [
        ({"stop": "界"}, ANSWER[: ANSWER.index("界")], "stop"),
        ({"stop": ["says", "🚀 says"]}, ANSWER[: ANSWER.index("🚀 says")], "stop"),
        ({"stop": "not there"}, ANSWER, "stop"),
        ({"max_tokens": 6}, ANSWER[:2], "length"),
        ({"max_completion_tokens": 3, "max_tokens": 6}, ANSWER[:1], "length"),
        ({"temperature": 2, "extra_body": {"top_k": 1}}, ANSWER, "stop"),
        ({"temperature": 2, "extra_body": {"min_p": 0.999}}, ANSWER, "stop"),
        ({"temperature": 2, "top_p": 1e-6}, ANSWER, "stop"),
        ({"temperature": 1e-46}, ANSWER, "stop"),
        ({"user": "me", "frequency_penalty": 0, "tools": [], "logit_bias": {}}, ANSWER, "stop"),
        ({"parallel_tool_calls": True, "tool_choice": "auto"}, ANSWER, "stop"),
        ({"modalities": ["text"], "tool_choice": "none"}, ANSWER, "stop"),
    ],
)
def test_options(client: openai.OpenAI, more: dict[str, Any], text: str, finish: str) -> None:
    (choice,) = client.chat.completions.create(**CHAT | more).choices
    assert (choice.message.content, choice.finish_reason) == (text, finish)
    chunks = list(client.chat.completions.create(**CHAT | more, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == finish


def test_repetition_penalty_changes_the_answer(client: openai.OpenAI) -> None:
    options = TEXT | {"temperature": 0, "max_tokens": 40}
    plain = client.completions.create(**options)
    other = client.completions.create(**options, extra_body={"repetition_penalty": 3.0})
    assert plain.choices[0].text != other.choices[0].text


def test_seeds_and_choices(client: openai.OpenAI) -> None:
    def texts(**more: Any) -> list[str]:
        return [choice.text for choice in client.completions.create(**TEXT | more).choices]

    assert texts(seed=5) == texts(seed=5) != texts(seed=6)
    assert texts() != texts()
    three = texts(seed=5, n=3)
    assert three[:1] == texts(seed=5)
    assert len(set(three)) == 3
    chunks = list(client.completions.create(**TEXT | {"seed": 5, "n": 3}, stream=True))
    for index in range(3):
        pieces = [c.choices[0].text for c in chunks if c.choices[0].index == index]
        assert "".join(pieces) == three[index]


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    def logprobs(choices: list[Any]) -> list[Any]:
        return [token for choice in choices if choice.logprobs for token in choice.logprobs.content]

    options = CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 7}
    tokens = logprobs(client.chat.completions.create(**options).choices)
    assert len(tokens) == 7
    content = bytes(b for token in tokens for b in token.bytes)
    assert content.decode(errors="ignore") == ANSWER[:2]
    for token in tokens:
        likeliest, second = token.top_logprobs
        assert token.logprob == likeliest.logprob >= second.logprob
        assert likeliest.bytes in (None, token.bytes)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert logprobs([chunk.choices[0] for chunk in chunks]) == tokens
    single = logprobs(client.chat.completions.create(**options | {"top_logprobs": 0}).choices)
    assert [token.logprob for token in single] == [token.logprob for token in tokens]
    assert {len(token.top_logprobs) for token in single} == {0}


@pytest.mark.parametrize("held_back", [False, True])
def test_logprobs_of_a_text(client: openai.OpenAI, held_back: bool) -> None:
    options = TEXT | {"logprobs": 3, "seed": 2}
    if held_back:  # the first characters, as they may become a stop text
        options["stop"] = client.completions.create(**options).choices[0].text[:8] + "~~"
    reply = client.completions.create(**options).choices[0].logprobs
    assert reply is not None
    assert reply.tokens is not None
    assert reply.text_offset == [len("".join(reply.tokens[:i])) for i in range(12)]
    assert all(logprob <= 0 for logprob in reply.token_logprobs or [])
    assert all(1 <= len(top) <= 3 for top in reply.top_logprobs or [])
    chunks = list(client.completions.create(**options, stream=True))
    streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    for field, values in reply:
        assert [v for part in streamed for v in getattr(part, field)] == values


@pytest.mark.parametrize("stop", ["你", "界", "says", "s: 再", "not there"])
def test_logprobs_end_with_the_text(client: openai.OpenAI, stop: str) -> None:
    def logprobs(choices: list[Any]) -> list[Any]:
        return [token for choice in choices if choice.logprobs for token in choice.logprobs.content]

    options = CHAT | {"logprobs": True, "stop": stop}
    reply = client.chat.completions.create(**options)
    tokens = reply.choices[0].logprobs.content
    assert bytes(b for token in tokens for b in token.bytes).decode() == ANSWER.partition(stop)[0]
    assert reply.usage is not None
    left_out = reply.usage.completion_tokens - len(tokens)
    assert left_out == 0 if stop == "not there" else left_out >= 2
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert logprobs([chunk.choices[0] for chunk in chunks]) == tokens
    shown = spoken = b""
    for chunk in chunks:
        shown += (chunk.choices[0].delta.content or "").encode()
        spoken += bytes(b for token in logprobs(chunk.choices) for b in token.bytes)
        assert spoken.startswith(shown)


@pytest.mark.parametrize("stop", ["你", "A", "s: 再"])
def test_logprobs_of_a_text_end_with_it(client: openai.OpenAI, served: Served, stop: str) -> None:
    engine = served.worker.engines["sft"]
    text = ANSWER.partition(stop)[0]
    prompt = engine.encode([Message("user", QUESTION)])
    cut = len(engine.encode(text)) if text else 0
    options = CHAT | {"prompt": prompt, "logprobs": 1, "max_tokens": 100}
    del options["messages"]
    complete = client.completions.create(**options).choices[0].logprobs
    (choice,) = client.completions.create(**options, stop=stop).choices
    chunks = list(client.completions.create(**options, stop=stop, stream=True))
    streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert choice.text == text
    assert complete is not None
    for field, values in complete:
        assert getattr(choice.logprobs, field) == values[:cut]
        assert [v for part in streamed for v in getattr(part, field)] == values[:cut]


async def gathered(served: Served, bodies: list[dict[str, Any]]) -> list[str]:
    """Ask for all at once, as streams."""

    async def one(client: openai.AsyncOpenAI, body: dict[str, Any]) -> str:
        text = ""
        async for chunk in await client.completions.create(**body, stream=True):
            text += chunk.choices[0].text
        return text

    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0
    ) as client:
        return await asyncio.gather(*(one(client, body) for body in bodies))


def test_parallel_streams_say_what_each_says_alone(served: Served, client: openai.OpenAI) -> None:
    prompts = [QUESTION * (1 + seed % 5) for seed in range(64)]
    bodies = [TEXT | {"seed": seed, "prompt": prompts[seed]} for seed in range(64)]
    together = asyncio.run(gathered(served, bodies))
    single = [client.completions.create(**body).choices[0].text for body in bodies]
    assert together == single
    assert len(set(together)) == 64
