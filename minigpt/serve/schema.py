"""The requests of OpenAI's API, checked, and the bodies of its responses."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minigpt.data.formats import Message
from minigpt.infer.continuous_batch import Delta, TokenLogprob
from minigpt.infer.engine import Sampling

# Clients send these as a matter of course; they change nothing about an answer.
IGNORED_FIELDS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",  # `tools` are refused
}
# Fields that MiniGPT does not support, with the values that change nothing; others are refused.
NO_OP_VALUES: dict[str, list[object]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "echo": [False],
    "best_of": [1],
    "suffix": [""],
}

MAX_FIELDS = 64  # of an object; each unknown one is an error of its own
MAX_LOGPROBS = 100_000  # of an answer that is sent as one body


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"an object has at most {MAX_FIELDS} fields")
        return value


class TextPart(_Strict):
    """A part of a message; images and audio are not read."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. Clients send back what they were sent, so unknown fields are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)]

    def to_message(self) -> Message:
        """Return the message as the chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, self.content)
        return Message(role, "".join(part.text for part in self.content))


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class CompletionRequest(_Strict):
    """The fields that chats and texts have in common."""

    model: Annotated[str, Field(max_length=256)]
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, body: object) -> object:
        if not isinstance(body, dict) or len(body) > MAX_FIELDS:
            return body
        return {
            name: value
            for name, value in body.items()
            if value is not None
            and name not in IGNORED_FIELDS
            and value not in NO_OP_VALUES.get(name, ())
        }

    @model_validator(mode="after")
    def _check_dependent_fields(self) -> CompletionRequest:
        if self.stream_options and not self.stream:
            raise ValueError("'stream_options' needs 'stream' to be true.")
        if getattr(self, "top_logprobs", 0) and not getattr(self, "logprobs", 0):
            raise ValueError("'top_logprobs' needs 'logprobs' to be true.")
        return self

    def samplings(self, max_new_tokens: int) -> list[Sampling]:
        """Return the sampling of each of the `n` choices, of at most so many new tokens."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return [
            Sampling(
                max_new_tokens=min(self.max_tokens or max_new_tokens, max_new_tokens),
                temperature=self.temperature,
                top_k=max(self.top_k, 0),
                top_p=self.top_p,
                seed=(seed + choice) % 2**63,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                logprobs=self.n_top_logprobs(),
            )
            for choice in range(self.n)
        ]

    def n_top_logprobs(self) -> int | None:
        """Return how many of the likeliest tokens a position lists; None for no log-probs."""
        if isinstance(self, ChatRequest):
            return self.top_logprobs if self.logprobs else None
        return self.logprobs if isinstance(self, TextRequest) else None


class ChatRequest(CompletionRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    def model_post_init(self, _: object) -> None:
        """Take the newer name of the limit where both are given."""
        self.max_tokens = self.max_completion_tokens or self.max_tokens


# Lists end at their first error: a megabyte has room for hundreds of thousands.
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=64, fail_fast=True)]
IdLists = Annotated[list[Ids], Field(min_length=1, max_length=64, fail_fast=True)]


class TextRequest(CompletionRequest):
    """The body of `/v1/completions`; prompts are texts or token ids."""

    prompt: str | Ids | Texts | IdLists
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> Sequence[str | list[int]]:
        """Return all prompts: each a text, or a list of ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ResponseBuilder:
    """Builds the bodies of the response to one request.

    Args:
        request: parsed and checked.
        prompt_tokens: the length of its prompts together.
        choices: how many sequences are generated.
    """

    def __init__(self, request: CompletionRequest, prompt_tokens: int, choices: int) -> None:
        self.request = request
        self.chat = isinstance(request, ChatRequest)
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.texts = [""] * choices
        self.finish_reasons = [""] * choices
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in range(choices)]
        self.offsets = [0] * choices  # length of the text of the tokens in earlier chunks
        self.started: set[int] = set()  # sequences whose role has been sent
        self.streams_usage = bool(request.stream_options and request.stream_options.include_usage)
        kind = "chat.completion" if self.chat else "text_completion"
        kind += ".chunk" if request.stream and self.chat else ""
        self.head: dict[str, Any] = {"object": kind, "model": request.model}
        name = "chatcmpl" if self.chat else "cmpl"
        self.head |= {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time())}

    def add(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """Add new tokens of a sequence; return the chunk of a stream, if it has any content."""
        logprobs = self._logprobs(delta.logprobs, self.offsets[index])
        self.offsets[index] += sum(len(entry.token) for entry in delta.logprobs)
        if not self.request.stream:
            self.texts[index] += delta.text
            self.logprobs[index] += delta.logprobs
            self.finish_reasons[index] = delta.finish or ""
        self.completion_tokens += len(delta.ids)
        if not (delta.text or logprobs or delta.finish):
            return None
        content: dict[str, Any] = {"text": delta.text}
        if self.chat:
            content = {"delta": {"content": delta.text}}
            if index not in self.started:
                content["delta"]["role"] = "assistant"
        self.started.add(index)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": delta.finish}
        return self.head | {"choices": [choice]} | ({"usage": None} if self.streams_usage else {})

    def body(self) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        choices = []
        for index, text in enumerate(self.texts):
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.chat else {"text": text}
            logprobs = self._logprobs(self.logprobs[index], 0)
            reason = self.finish_reasons[index]
            choices.append(
                {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
            )
        return self.usage_chunk() | {"choices": choices}

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream, with the usage."""
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        usage["total_tokens"] = self.prompt_tokens + self.completion_tokens
        return self.head | {"choices": [], "usage": usage}

    def _logprobs(self, tokens: Sequence[TokenLogprob], start: int) -> dict[str, Any] | None:
        if self.request.n_top_logprobs() is None or (self.request.stream and not tokens):
            return None
        return _chat_logprobs(tokens) if self.chat else _text_logprobs(tokens, start)


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = []
    for entry in tokens:
        top = [
            # U+FFFD stands for a part of a character, whose bytes are lost.
            _chat_logprob(token, logprob, None if "\ufffd" in token else list(token.encode()))
            for _, token, logprob in entry.top
        ]
        sampled = _chat_logprob(entry.token, entry.logprob, entry.bytes)
        content.append(sampled | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_logprob(token: str, logprob: float, content: list[int] | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": content}


def _text_logprobs(tokens: Sequence[TokenLogprob], start: int) -> dict[str, Any]:
    texts = [entry.token for entry in tokens]
    offsets = list(accumulate(map(len, texts), initial=start))[: len(texts)]
    return {
        "tokens": texts,
        "token_logprobs": [entry.logprob for entry in tokens],
        "top_logprobs": [{token: logprob for _, token, logprob in entry.top} for entry in tokens],
        "text_offset": offsets,
    }
