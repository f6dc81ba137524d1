"""The API as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
import tiny
from serving import ASKED, SAID, Served

from minigpt.data.formats import Message
from minigpt.infer.continuous_batch import ContinuousBatch

CHAT: dict[str, Any] = {
    "model": "sft",
    "messages": [{"role": "user", "content": ASKED}],
    "temperature": 0,
}
TEXT: dict[str, Any] = {"model": "base", "prompt": ASKED, "max_tokens": 12, "temperature": 1.0}


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
    assert (choice.message.role, choice.message.content) == ("assistant", SAID)
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert (reply.object, reply.model) == ("chat.completion", "sft")
    assert reply.id.startswith("chatcmpl-")
    assert reply.usage is not None
    said = served.worker.engines["sft"].encode(SAID)
    assert reply.usage.completion_tokens == len(said)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + len(said)


def test_stream(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options=options))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *told, last = chunks
    parts = [chunk.choices[0].delta.content or "" for chunk in told]
    assert "".join(parts) == SAID
    assert all(part in SAID for part in parts)  # no half characters
    assert len(parts) > 15
    assert [chunk.choices[0].delta.role for chunk in told] == ["assistant"] + [None] * (
        len(told) - 1
    )
    assert [c.choices[0].finish_reason for c in told] == [None] * (len(told) - 1) + ["stop"]
    assert {chunk.usage for chunk in told} == {None}
    whole = client.chat.completions.create(**CHAT)
    assert (last.choices, last.usage) == ([], whole.usage)


def test_stream_ends_with_done(served: Served) -> None:
    body = CHAT | {"stream": True, "max_tokens": 3}
    answer = served.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
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
    ids = served.worker.engines["base"].encode(ASKED)
    asked = TEXT | {"temperature": 0}
    (alone,) = client.completions.create(**asked).choices
    for prompt, count in ((ids, 1), ([ASKED, ASKED], 2), ([ids, ids, ids], 3)):
        reply = client.completions.create(**asked | {"prompt": prompt})
        assert [c.text for c in reply.choices] == [alone.text] * count
        assert [c.index for c in reply.choices] == list(range(count))
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == count * len(ids)


def test_a_users_message_opens_no_turn(
    client: openai.OpenAI, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    add = ContinuousBatch.add

    def spied(batch: ContinuousBatch, ids: list[int], *more: Any) -> int:
        asked.append(ids)
        return add(batch, ids, *more)

    monkeypatch.setattr(ContinuousBatch, "add", spied)
    message = {"role": "user", "content": tiny.FORGED}
    for stream in (False, True):
        reply = client.chat.completions.create(
            **CHAT | {"messages": [message], "max_tokens": 2, "stream": stream}
        )
        if stream:
            list(reply)
    tokenizer = served.worker.engines["sft"].tokenizer
    assert asked == [tiny.asked_as_text(tokenizer, tiny.FORGED)] * 2


def test_messages_in_parts_and_roles(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    whole = client.chat.completions.create(**CHAT)
    same = client.chat.completions.create(
        **CHAT | {"messages": [{"role": "user", "content": parts}]}
    )
    assert same.choices[0].message.content == SAID
    # What a client got it may send back as it is.
    turns = [*CHAT["messages"], whole.choices[0].message, {"role": "user", "content": ASKED}]
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
        ({"stop": "界"}, SAID[: SAID.index("界")], "stop"),
        ({"stop": ["says", "🚀 says"]}, SAID[: SAID.index("🚀 says")], "stop"),
        ({"stop": "not there"}, SAID, "stop"),
        ({"max_tokens": 6}, SAID[:2], "length"),
        ({"max_completion_tokens": 3, "max_tokens": 6}, SAID[:1], "length"),
        ({"temperature": 2, "extra_body": {"top_k": 1}}, SAID, "stop"),
        ({"temperature": 2, "extra_body": {"min_p": 0.999}}, SAID, "stop"),
        ({"temperature": 2, "top_p": 1e-6}, SAID, "stop"),
        ({"user": "me", "frequency_penalty": 0, "tools": [], "logit_bias": {}}, SAID, "stop"),
        ({"parallel_tool_calls": True, "tool_choice": "auto"}, SAID, "stop"),
        ({"modalities": ["text"], "tool_choice": "none"}, SAID, "stop"),
    ],
)
def test_options(client: openai.OpenAI, more: dict[str, Any], text: str, finish: str) -> None:
    (choice,) = client.chat.completions.create(**CHAT | more).choices
    assert (choice.message.content, choice.finish_reason) == (text, finish)
    chunks = list(client.chat.completions.create(**CHAT | more, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == finish


def test_repetition_penalty_changes_the_answer(client: openai.OpenAI) -> None:
    asked = TEXT | {"temperature": 0, "max_tokens": 40}
    plain = client.completions.create(**asked)
    other = client.completions.create(**asked, extra_body={"repetition_penalty": 3.0})
    assert plain.choices[0].text != other.choices[0].text


def test_seeds_and_choices(client: openai.OpenAI) -> None:
    def said(**more: Any) -> list[str]:
        return [choice.text for choice in client.completions.create(**TEXT | more).choices]

    assert said(seed=5) == said(seed=5) != said(seed=6)
    assert said() != said()
    three = said(seed=5, n=3)
    assert three[:1] == said(seed=5)
    assert len(set(three)) == 3
    chunks = list(client.completions.create(**TEXT | {"seed": 5, "n": 3}, stream=True))
    for index in range(3):
        parts = [c.choices[0].text for c in chunks if c.choices[0].index == index]
        assert "".join(parts) == three[index]


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    def told(choices: list[Any]) -> list[Any]:
        return [token for choice in choices if choice.logprobs for token in choice.logprobs.content]

    asked = CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 7}
    tokens = told(client.chat.completions.create(**asked).choices)
    assert len(tokens) == 7
    assert bytes(b for token in tokens for b in token.bytes[:]).decode(errors="ignore") == SAID[:2]
    for token in tokens:
        likeliest, second = token.top_logprobs
        assert token.logprob == likeliest.logprob >= second.logprob
        assert likeliest.bytes in (None, token.bytes)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert told([chunk.choices[0] for chunk in chunks]) == tokens
    alone = told(client.chat.completions.create(**asked | {"top_logprobs": 0}).choices)
    assert [token.logprob for token in alone] == [token.logprob for token in tokens]
    assert {len(token.top_logprobs) for token in alone} == {0}


@pytest.mark.parametrize("held", [False, True])
def test_logprobs_of_a_text(client: openai.OpenAI, held: bool) -> None:
    asked = TEXT | {"logprobs": 3, "seed": 2}
    if held:  # the first characters, as they may become a stop text
        asked["stop"] = client.completions.create(**asked).choices[0].text[:8] + "~~"
    told = client.completions.create(**asked).choices[0].logprobs
    assert told is not None
    assert told.tokens is not None
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(12)]
    assert all(logprob <= 0 for logprob in told.token_logprobs or [])
    assert all(1 <= len(top) <= 3 for top in told.top_logprobs or [])
    chunks = list(client.completions.create(**asked, stream=True))
    streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    for field, values in told:
        assert [v for part in streamed for v in getattr(part, field)] == values


@pytest.mark.parametrize("stop", ["你", "界", "says", "s: 再", "not there"])
def test_logprobs_end_with_the_text(client: openai.OpenAI, stop: str) -> None:
    def told(choices: list[Any]) -> list[Any]:
        return [token for choice in choices if choice.logprobs for token in choice.logprobs.content]

    asked = CHAT | {"logprobs": True, "stop": stop}
    reply = client.chat.completions.create(**asked)
    tokens = reply.choices[0].logprobs.content
    assert bytes(b for token in tokens for b in token.bytes).decode() == SAID.partition(stop)[0]
    assert reply.usage is not None
    held = reply.usage.completion_tokens - len(tokens)
    assert held == 0 if stop == "not there" else held >= 2
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert told([chunk.choices[0] for chunk in chunks]) == tokens
    shown = spoken = b""
    for chunk in chunks:
        shown += (chunk.choices[0].delta.content or "").encode()
        spoken += bytes(b for token in told(chunk.choices) for b in token.bytes)
        assert spoken.startswith(shown)


@pytest.mark.parametrize("stop", ["你", "A", "s: 再"])
def test_logprobs_of_a_text_end_with_it(client: openai.OpenAI, served: Served, stop: str) -> None:
    engine, said = served.worker.engines["sft"], SAID.partition(stop)[0]
    prompt, cut = engine.encode([Message("user", ASKED)]), len(engine.encode(said)) if said else 0
    asked = CHAT | {"prompt": prompt, "logprobs": 1, "max_tokens": 100}
    del asked["messages"]
    whole = client.completions.create(**asked).choices[0].logprobs
    (choice,) = client.completions.create(**asked, stop=stop).choices
    chunks = list(client.completions.create(**asked, stop=stop, stream=True))
    streamed = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert choice.text == said
    assert whole is not None
    for field, values in whole:
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
    prompts = [ASKED * (1 + seed % 5) for seed in range(64)]
    bodies = [TEXT | {"seed": seed, "prompt": prompts[seed]} for seed in range(64)]
    together = asyncio.run(gathered(served, bodies))
    alone = [client.completions.create(**body).choices[0].text for body in bodies]
    assert together == alone
    assert len(set(together)) == 64
