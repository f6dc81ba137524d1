"""What OpenAI's clients send, checked, and what they get back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minigpt.data.formats import Message
from minigpt.infer.continuous_batch import Delta, TokenLogprob
from minigpt.infer.engine import Sampling

# Clients send these as a matter of course; they change nothing about an answer.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
HARMLESS |= {"parallel_tool_calls"}  # `tools` are refused
# What MiniGPT cannot do, at the values that ask for nothing; any other value is refused.
IDLE: dict[str, list[Any]] = {"frequency_penalty": [0], "presence_penalty": [0], "logit_bias": [{}]}
IDLE |= {"tools": [[]], "tool_choice": ["none", "auto"], "response_format": [{"type": "text"}]}
IDLE |= {"modalities": [["text"]], "echo": [False], "best_of": [1], "suffix": [""]}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message; images and audio are not read."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn. Clients send back what they were sent, so unknown fields are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def record(self) -> Message:
        """Return the turn as the chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        parts = self.content
        return Message(role, parts if isinstance(parts, str) else "".join(p.text for p in parts))


class StreamOptions(_Strict):
    """What a stream tells besides the text."""

    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Wanted(_Strict):
    """What chats and texts have in common."""

    model: Annotated[str, Field(max_length=256)]
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_idle(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        asks = {name: value for name, value in body.items() if value is not None}
        return {k: v for k, v in asks.items() if k not in HARMLESS and v not in IDLE.get(k, ())}

    @model_validator(mode="after")
    def _options_have_their_option(self) -> Wanted:
        if self.stream_options and not self.stream:
            raise ValueError("'stream_options' needs 'stream' to be true.")
        if getattr(self, "top_logprobs", 0) and not getattr(self, "logprobs", 0):
            raise ValueError("'top_logprobs' needs 'logprobs' to be true.")
        return self

    def samplings(self, room: int) -> list[Sampling]:
        """Return the sampling of each of the `n` choices; `room` tokens fit after the prompt."""
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return [
            Sampling(
                max_new_tokens=min(self.max_tokens or room, room),
                temperature=self.temperature,
                top_k=max(self.top_k, 0),
                top_p=self.top_p,
                seed=(seed + choice) % 2**63,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                logprobs=self.likeliest(),
            )
            for choice in range(self.n)
        ]

    def likeliest(self) -> int | None:
        """Return how many tokens to tell at each place; None for no log-probs at all."""
        if isinstance(self, ChatRequest):
            return self.top_logprobs if self.logprobs else None
        return self.logprobs if isinstance(self, TextRequest) else None


class ChatRequest(Wanted):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    def model_post_init(self, _: Any) -> None:
        """Take the newer name of the limit where both are given."""
        self.max_tokens = self.max_completion_tokens or self.max_tokens


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Several = Field(min_length=1, max_length=64)


class TextRequest(Wanted):
    """The body of `/v1/completions`; prompts are texts or token ids."""

    prompt: str | Ids | Annotated[list[str], Several] | Annotated[list[Ids], Several]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[Any]:
        """Return all prompts: each a text, or a list of ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)


class Answer:
    """The bodies that answer one request.

    Args:
        wanted: the request.
        prompt_tokens: the length of its prompts together.
        choices: how many answers it gets.
    """

    def __init__(self, wanted: Wanted, prompt_tokens: int, choices: int) -> None:
        self.wanted, self.chat = wanted, isinstance(wanted, ChatRequest)
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.texts, self.finish = [""] * choices, [""] * choices
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in range(choices)]
        self.offsets = [0] * choices  # the length of the tokens that were told, each as a text
        self.started: set[int] = set()
        self.tells_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
        kind = "chat.completion" if self.chat else "text_completion"
        kind += ".chunk" if wanted.stream and self.chat else ""
        self.head: dict[str, Any] = {"object": kind, "model": wanted.model}
        name = "chatcmpl" if self.chat else "cmpl"
        self.head |= {"id": f"{name}-{secrets.token_hex(12)}", "created": int(time.time())}

    def add(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """Count a new part in; return the chunk of a stream that tells it, if it says anything."""
        told = self._logprobs(delta.logprobs, self.offsets[index])
        self.offsets[index] += sum(len(one.token) for one in delta.logprobs)
        self.texts[index] += delta.text
        self.logprobs[index] += delta.logprobs
        self.finish[index] = delta.finish or ""
        self.completion_tokens += len(delta.ids)
        if not (delta.text or told or delta.finish):
            return None
        said: dict[str, Any] = {"text": delta.text}
        if self.chat:
            said = {"delta": {"content": delta.text}}
            if index not in self.started:
                said["delta"]["role"] = "assistant"
        self.started.add(index)
        choice = {"index": index, **said, "logprobs": told, "finish_reason": delta.finish}
        return self.head | {"choices": [choice]} | ({"usage": None} if self.tells_usage else {})

    def whole(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        choices = []
        for index, text in enumerate(self.texts):
            message = {"role": "assistant", "content": text, "refusal": None}
            said = {"message": message} if self.chat else {"text": text}
            told = self._logprobs(self.logprobs[index], 0)
            finish = self.finish[index]
            choices.append({"index": index, **said, "logprobs": told, "finish_reason": finish})
        return self.closing() | {"choices": choices}

    def closing(self) -> dict[str, Any]:
        """Return the last chunk of a stream that tells the usage."""
        used = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        used["total_tokens"] = self.prompt_tokens + self.completion_tokens
        return self.head | {"choices": [], "usage": used}

    def _logprobs(self, tokens: Sequence[TokenLogprob], start: int) -> dict[str, Any] | None:
        if self.wanted.likeliest() is None or (self.wanted.stream and not tokens):
            return None
        return _of_chat(tokens) if self.chat else _of_text(tokens, start)


def _of_chat(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    def told(token: str, logprob: float, said: list[int] | None) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": said}

    def likely(token: str, logprob: float) -> dict[str, Any]:
        # Half a character has no text from which its bytes could be had.
        return told(token, logprob, None if "\ufffd" in token else list(token.encode()))

    tops = [[likely(token, logprob) for _, token, logprob in one.top] for one in tokens]
    content = [
        told(one.token, one.logprob, one.bytes) | {"top_logprobs": top}
        for one, top in zip(tokens, tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _of_text(tokens: Sequence[TokenLogprob], start: int) -> dict[str, Any]:
    said = [one.token for one in tokens]
    return {
        "tokens": said,
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [{token: logprob for _, token, logprob in one.top} for one in tokens],
        "text_offset": [start + len("".join(said[:place])) for place in range(len(said))],
    }
