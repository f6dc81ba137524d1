"""What OpenAI's clients send, checked, and what they get back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minigpt.data.records import Message
from minigpt.infer.batch import Delta, TokenLogprob
from minigpt.infer.engine import Sampling

MAX_MESSAGES = 1024
MAX_PROMPTS = 64
# Clients send these as a matter of course; they change nothing about an answer.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Known to the API but not to MiniGPT: taken only at the value that asks for nothing.
NEUTRAL: dict[str, list[Any]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "echo": [False],
    "best_of": [1],
    "suffix": [""],
}


def refuse_unsupported(body: Any) -> Any:
    """Drop what asks for nothing and refuse what MiniGPT cannot do, by name."""
    if not isinstance(body, dict):
        return body
    kept = {}
    for name, value in body.items():
        if name in HARMLESS or value is None or (name in NEUTRAL and value in NEUTRAL[name]):
            continue
        if name in NEUTRAL:
            raise ValueError(f"{name!r} is not supported: leave it out.")
        kept[name] = value
    return kept


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
    include_obfuscation: Literal[False] = False


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Wanted(_Strict):
    """What chats and texts have in common."""

    model: Annotated[str, Field(max_length=256)]
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=16)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    _refuse = model_validator(mode="before")(refuse_unsupported)

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Wanted:
        if self.stream_options and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true.")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to tell at each place; None for no log-probabilities."""
        raise NotImplementedError

    def samplings(self, room: int) -> list[Sampling]:
        """Return the sampling of each of the `n` choices.

        Args:
            room: how many tokens fit after the prompt; more are not asked for.
        """
        seed = secrets.randbits(62) if self.seed is None else self.seed
        base = {
            "max_new_tokens": max(1, min(self.max_tokens or room, room)),
            "temperature": self.temperature,
            "top_k": max(self.top_k, 0),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            "logprobs": self.alternatives,
        }
        return [Sampling(**base, seed=(seed + index) % 2**63) for index in range(self.n)]


class ChatRequest(Wanted):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' needs 'logprobs' to be true.")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to tell at each place; None for no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


Ids = list[Annotated[int, Field(ge=0)]]
Prompts = Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]


class TextRequest(Wanted):
    """The body of `/v1/completions`; prompts are texts or token ids."""

    prompt: str | Ids | Prompts
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to tell at each place; None for no log-probabilities."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return all prompts, of whichever form."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


@dataclass
class Choice:
    """What has been said of one choice so far."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None


class Answer:
    """The bodies that answer one request.

    Args:
        wanted: the request.
        prompt_tokens: the length of its prompts together.
        choices: how many answers it gets.
    """

    def __init__(self, wanted: Wanted, prompt_tokens: int, choices: int) -> None:
        self.wanted, self.chat = wanted, isinstance(wanted, ChatRequest)
        self.choices = [Choice() for _ in range(choices)]
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": wanted.model,
        }

    def add(self, index: int, delta: Delta) -> None:
        """Count a new part in."""
        choice = self.choices[index]
        choice.text += delta.text
        choice.logprobs += delta.logprobs
        choice.finish = delta.finish
        self.completion_tokens += len(delta.ids)

    def whole(self) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        choices = []
        for index, choice in enumerate(self.choices):
            said: dict[str, Any] = {"text": choice.text}
            if self.chat:
                message = {"role": "assistant", "content": choice.text, "refusal": None}
                said = {"message": message}
            told = self._logprobs(choice.logprobs, 0)
            choices.append(
                {"index": index, **said, "logprobs": told, "finish_reason": choice.finish}
            )
        return {**self._head, "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks that open a stream: those of a chat say who speaks."""
        said = {"role": "assistant", "content": "", "refusal": None}
        count = len(self.choices) if self.chat else 0
        return [self._chunk(index, {"delta": said}, None, None) for index in range(count)]

    def part(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Return the chunks of a stream that tell a new part; `add` comes after."""
        told = self._logprobs(delta.logprobs, len(self.choices[index].text))
        silent = not delta.text and told is None
        if not self.chat:
            silent = silent and delta.finish is None
            chunk = self._chunk(index, {"text": delta.text}, told, delta.finish)
            return [] if silent else [chunk]
        chunks = []
        if not silent:
            chunks.append(self._chunk(index, {"delta": {"content": delta.text}}, told, None))
        if delta.finish is not None:
            chunks.append(self._chunk(index, {"delta": {}}, None, delta.finish))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """Return the chunk with the usage, where the client asked for it."""
        if not self._tells_usage:
            return []
        return [{**self._chunk_head, "choices": [], "usage": self._usage()}]

    @property
    def _tells_usage(self) -> bool:
        options = self.wanted.stream_options
        return options is not None and options.include_usage

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _chunk(
        self, index: int, said: dict[str, Any], logprobs: Any, finish: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._tells_usage else {}
        return {**self._chunk_head, "choices": [choice], **usage}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob], start: int) -> dict[str, Any] | None:
        if self.wanted.alternatives is None or not tokens:
            return None
        return _chat_logprobs(tokens) if self.chat else _text_logprobs(tokens, start)


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    def likely(token: str, logprob: float) -> dict[str, Any]:
        whole = "\ufffd" not in token  # half a character has no text, and its bytes are not told
        said = list(token.encode()) if whole else None
        return {"token": token, "logprob": logprob, "bytes": said}

    content = [
        {
            "token": one.token,
            "logprob": one.logprob,
            "bytes": one.bytes,
            "top_logprobs": [likely(token, logprob) for _, token, logprob in one.top],
        }
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(tokens: Sequence[TokenLogprob], start: int) -> dict[str, Any]:
    offsets, place = [], start
    for one in tokens:
        offsets.append(place)
        place += len(one.token)
    return {
        "tokens": [one.token for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [{token: logprob for _, token, logprob in one.top} for one in tokens],
        "text_offset": offsets,
    }
