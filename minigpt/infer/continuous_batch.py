"""Continuous batching: requests come and go while the others go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.infer.sampling import Chooser, Sampling, choose
from minigpt.infer.text import Pieces, TextStream

if TYPE_CHECKING:
    from minigpt.infer.engine import Engine

PREFILL = 4096  # tokens of new prompts that one step takes; more would hold up the others

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-prob, in nats, as the model has it: before temperature and filters.

    Attributes:
        token: its text; bytes that are no character are replaced.
        id: its number.
        logprob: of the token.
        bytes: what it stands for.
        top: (id, text, log-prob) of the likeliest tokens.
    """

    token: str
    id: int
    logprob: float
    bytes: list[int]
    top: list[tuple[int, str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Delta:
    """What one step adds to a reply.

    Attributes:
        request: number of the request.
        text: new text; "" while a stop text or an unfinished character is held back.
        ids: new tokens, without the one that ends the reply.
        logprobs: where they were asked for, of the tokens whose text is certain now; those of a
            stop text are never told.
        finish: why the reply ended: at an end token or a stop text, or at its longest length.
        ended_by: the end token.
    """

    request: int
    text: str
    ids: list[int]
    logprobs: list[TokenLogprob]
    finish: Finish | None = None
    ended_by: int | None = None


def check_fits(ids: Sequence[int], context: int, name: str = "") -> None:
    """Refuse, with a ConfigError that begins with its name, a prompt that fills the context."""
    if len(ids) + 1 > context:
        raise ConfigError(
            f"{name}The prompt has {len(ids)} tokens, but the model's context length is "
            f"{context} tokens, the reply included. Give a shorter prompt."
        )


class _Request:
    def __init__(self, number: int, ids: list[int], sampling: Sampling, engine: Engine) -> None:
        self.number, self.ids, self.sampling = number, ids, sampling
        self.chooser = Chooser(sampling, ids)
        self.stream = TextStream(engine.tokenizer, sampling.stop)
        self.left = min(sampling.max_new_tokens, engine.context - len(ids))
        self.last = ids[-1]
        self.held: list[tuple[int, TokenLogprob]] = []  # with the places where they begin

    def certain(self, ended: bool) -> list[TokenLogprob]:
        """Return the log-probs that can be told now; a stop text takes its own along."""
        every = not self.sampling.stop or (ended and not self.stream.stopped)
        out = [one for place, one in self.held if every or place < self.stream.passed]
        self.held = self.held[len(out) :]
        return out


class ContinuousBatch:
    """Requests that are decoded together. The caller owns the thread.

    Args:
        engine: whose model is used; it must stay in eval mode.
        slots: how many requests are decoded at once; the others wait.
    """

    def __init__(self, engine: Engine, slots: int) -> None:
        self.engine, self.slots = engine, slots
        self._runner = engine.runner()
        self._pieces = Pieces(engine.tokenizer)
        self._rows: list[_Request] = []
        self._queue: deque[_Request] = deque()
        self._count = 0

    def add(self, ids: list[int], sampling: Sampling, name: str = "") -> int:
        """Queue a request and return its number; an error begins with its name.

        Raises:
            ConfigError: for a prompt that fills the model's context.
        """
        check_fits(ids, self.engine.context, name)
        self._count += 1
        self._queue.append(_Request(self._count, list(ids), sampling, self.engine))
        return self._count

    @property
    def active(self) -> int:
        """How many requests are being decoded."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._rows and not self._queue

    def cancel(self, number: int) -> None:
        """Forget a request; nothing happens when it has ended."""
        self._queue = deque(r for r in self._queue if r.number != number)
        for row, request in enumerate(self._rows):
            if request.number == number:
                self._drop(row)
                break

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Decode one token of each active request, and of those that find a slot."""
        if self.idle:
            return []
        logits = []
        new = self._admitted()
        if self._rows:
            logits.append(self._runner.step([request.last for request in self._rows]))
        if new:
            logits.append(self._runner.admit([request.ids for request in new]))
            self._rows += new
        every = torch.cat(logits) if len(logits) > 1 else logits[0]
        tokens = choose(every, [request.chooser for request in self._rows])
        told = self._logprobs(every, tokens)
        deltas = [self._advance(*given) for given in zip(self._rows, tokens, told, strict=True)]
        for row in reversed(range(len(deltas))):
            if deltas[row].finish is not None:
                self._drop(row)
        return deltas

    def _admitted(self) -> list[_Request]:
        """Take the requests off the queue that begin now."""
        room = self.slots - len(self._rows)
        if not self._runner.joins and len(self._queue) > room < self.slots / 2:
            return []  # such requests stay apart from the others, so they had better be many
        new: list[_Request] = []
        while self._queue and len(new) < room:
            if new and sum(len(r.ids) for r in [*new, self._queue[0]]) > PREFILL:
                break
            new.append(self._queue.popleft())
        return new

    def _drop(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        self._runner.drop(row)
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def _advance(self, request: _Request, token: int, told: list[TokenLogprob]) -> Delta:
        request.last, request.left = token, request.left - 1
        if token in self.engine.ends:
            text, told = request.stream.end(), request.certain(True)
            return Delta(request.number, text, [], told, "stop", token)
        request.held += [(request.stream.came, one) for one in told]
        text = request.stream.add(token)
        finish: Finish | None = None
        if request.left == 0 and not request.stream.stopped:
            text, finish = text + request.stream.end(), "length"
        if request.stream.stopped:
            finish = "stop"
        return Delta(request.number, text, [token], request.certain(finish is not None), finish)

    def _logprobs(self, logits: Tensor, tokens: Sequence[int]) -> list[list[TokenLogprob]]:
        asked = [request.sampling.logprobs for request in self._rows]
        return [
            [] if n is None else [self._logprob(row, token, n)]
            for row, token, n in zip(logits, tokens, asked, strict=True)
        ]

    def _logprob(self, logits: Tensor, token: int, count: int) -> TokenLogprob:
        values = logits.float().log_softmax(-1)
        text, sizes = self._pieces.text, values.topk(min(count, len(values)))
        likeliest = zip(sizes.indices.tolist(), sizes.values.tolist(), strict=True)
        top = [(index, text(index), value) for index, value in likeliest]
        return TokenLogprob(
            text(token), token, float(values[token]), self._pieces.bytes(token), top
        )
