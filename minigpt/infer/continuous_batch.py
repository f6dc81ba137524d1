"""Continuous batching: requests join and leave while others are decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch
from torch import Tensor

from minigpt.errors import ConfigError, MiniGPTError, is_panic
from minigpt.infer.native import NativeDecoder
from minigpt.infer.sampling import Sampler, Sampling, sample
from minigpt.infer.text import Pieces, TextStream

if TYPE_CHECKING:
    from minigpt.infer.engine import Engine

PREFILL = 4096  # tokens of new prompts that one step reads; more would hold up the others

Finish = Literal["stop", "length", "error"]
NOT_FINITE = "The model's logits are not finite here: its weights are damaged, or it overflows."


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability, in nats, before temperature and filters.

    Attributes:
        token: its text; bytes that are no character are replaced.
        id: its id in the vocabulary.
        logprob: its log-probability.
        bytes: its UTF-8 bytes.
        top: (id, text, log-probability) of the likeliest tokens.
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
        request: the number that `add` returned.
        text: new text; "" while a stop text or an unfinished character is held back.
        ids: new tokens, without the one that ends the reply.
        logprobs: log-probabilities of the tokens whose text is certain now, if the request asks
            for them; those of a stop text are left out.
        finish: why the reply ended: at an end token or a stop text, at its longest length, or by an
            error that is its own.
        ended_by: the end token, if one ended the reply.
        error: what went wrong, where `finish` is "error".
    """

    request: int
    text: str
    ids: list[int]
    logprobs: list[TokenLogprob]
    finish: Finish | None = None
    ended_by: int | None = None
    error: str | None = None


def is_failure(error: BaseException) -> bool:
    """Whether an error says that a computation failed, and not that a process is to stop."""
    return isinstance(error, Exception) or is_panic(error)


def check_fits(ids: Sequence[int], context: int, name: str = "") -> None:
    """Refuse, with a ConfigError whose message `name` begins, a prompt that fills the context."""
    if len(ids) + 1 > context:
        raise ConfigError(
            f"{name}The prompt has {len(ids)} tokens, but the model's context length is "
            f"{context} tokens, the reply included. Give a shorter prompt."
        )


class Request:
    """A reply that is decoded.

    Args:
        prompt: what it answers.
        sampling: how its tokens are drawn.
        context: longest sequence of the model in tokens, the reply included.

    Attributes:
        sampler: draws its tokens.
        last_token: what the decoder reads next.
        remaining: how many tokens it may still take.
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, context: int) -> None:
        self.sampler = Sampler(sampling, prompt)
        self.last_token = prompt[-1]
        self.remaining = min(sampling.max_new_tokens, context - len(prompt))

    def take(self, token: int) -> None:
        """Add a token."""
        self.last_token = token
        self.remaining -= 1


R = TypeVar("R", bound=Request)


class DecodingBatch(Generic[R]):
    """Requests that are decoded together, and those that wait, as tokens.

    Args:
        engine: the model and its tokenizer; the model must stay in eval mode.
        slots: how many requests are decoded at once; the others wait. At least as many as answer
            one prompt.
        prefill: tokens of new prompts that one step reads. A `NativeDecoder` reads a longer prompt
            in several steps; the others read it in one, and `PREFILL` tokens in any case, since
            those that begin apart are decoded apart.
    """

    def __init__(self, engine: Engine, slots: int, prefill: int = PREFILL) -> None:
        self.engine = engine
        self.slots = slots
        self._decoder = engine.decoder()
        # The decoder, if it reads a prompt in pieces.
        self._piecewise = self._decoder if isinstance(self._decoder, NativeDecoder) else None
        self._prefill = PREFILL if self._piecewise is None else prefill
        self._rows: list[R] = []
        self._queue: deque[tuple[list[int], list[R]]] = deque()  # a prompt, its requests
        self._tokens_read = 0  # of the first prompt in the queue

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._rows and not self._queue

    def enqueue(self, prompt: list[int], requests: Sequence[R]) -> None:
        """Let requests that answer one prompt wait for their slots, which they get together."""
        if requests:
            self._queue.append((prompt, list(requests)))

    def _next_logits(self) -> Tensor | None:
        """Read a token of each row, and the prompts whose turn it is; return logits [rows, V].

        A prompt is read once, for all of its requests. None where there is no row yet.
        """
        outputs = []
        new = self._next_groups()
        if self._rows:
            outputs.append(self._decoder.step([request.last_token for request in self._rows]))
        if new:
            counts = [len(requests) for _, requests in new]
            outputs.append(self._decoder.admit([ids for ids, _ in new], counts))
            self._rows += [request for _, requests in new for request in requests]
        if not outputs:
            return None
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _next_groups(self) -> list[tuple[list[int], list[R]]]:
        """Take the prompts off the queue that begin now, with their requests.

        Of a prompt that is too long for one step, the next piece is read.
        """
        free = self.slots - len(self._rows)
        waiting = sum(len(requests) for _, requests in self._queue)
        if not self._decoder.joins and free < self.slots / 2 and free < waiting:
            return []  # each cohort takes a forward pass of its own, so wait until there are many
        new: list[tuple[list[int], list[R]]] = []
        tokens = 0
        while self._queue:
            prompt, requests = self._queue[0]
            tokens += len(prompt) - self._tokens_read
            over_budget = tokens > self._prefill
            if len(requests) > free or (over_budget and new):
                break
            if over_budget and self._piecewise is not None:
                end = self._tokens_read + self._prefill
                self._piecewise.read(prompt[self._tokens_read : end])
                self._tokens_read = end
                break
            new.append(self._queue.popleft())
            self._tokens_read = 0
            free -= len(requests)
        return new

    def _drop(self, row: int) -> None:
        """Free a row; the last one moves there."""
        self._decoder.drop(row)
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last


class _TextRequest(Request):
    def __init__(self, number: int, ids: list[int], sampling: Sampling, engine: Engine) -> None:
        super().__init__(ids, sampling, engine.context)
        self.number = number
        self.sampling = sampling
        self.stream = TextStream(engine.tokenizer, sampling.stop)
        self.pending: list[tuple[int, TokenLogprob]] = []  # with the characters before each

    def released_logprobs(self, ended: bool) -> list[TokenLogprob]:
        """Return the log-probs of tokens whose text has been released; a stop text's never is."""
        all_released = not self.sampling.stop or (ended and not self.stream.stopped)
        released = [
            logprob
            for position, logprob in self.pending
            if all_released or position < self.stream.released
        ]
        self.pending = self.pending[len(released) :]
        return released


class ContinuousBatch(DecodingBatch[_TextRequest]):
    """Requests that are decoded together, as text. The caller owns the thread.

    Args:
        engine, slots, prefill: as of `DecodingBatch`.
    """

    def __init__(self, engine: Engine, slots: int, prefill: int = PREFILL) -> None:
        super().__init__(engine, slots, prefill)
        self._pieces = Pieces(engine.tokenizer)
        self._count = 0

    def add(self, ids: list[int], sampling: Sampling, name: str = "") -> int:
        """Queue a request and return its number; `name` begins the message of an error.

        Raises:
            ConfigError: for a prompt that fills the model's context.
        """
        check_fits(ids, self.engine.context, name)
        self._count += 1
        request = _TextRequest(self._count, ids, sampling, self.engine)
        self.enqueue(ids, [request])
        return self._count

    def cancel(self, number: int) -> None:
        """Forget a request; nothing happens when it has ended."""
        if self._piecewise is not None and self._tokens_read > 0:
            _, [first] = self._queue[0]
            if first.number == number:
                self._piecewise.forget()
                self._tokens_read = 0
        self._queue = deque((ids, [r]) for ids, [r] in self._queue if r.number != number)
        for row, request in enumerate(self._rows):
            if request.number == number:
                self._drop(row)
                break

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Decode one token of each active request, and of those that get a slot."""
        if self.idle:
            return []
        logits = self._next_logits()
        if logits is None:
            return []
        tokens = sample(logits, [request.sampler for request in self._rows])
        deltas = [
            self._delta(request, token, row)
            for request, token, row in zip(self._rows, tokens, logits, strict=True)
        ]
        for row in reversed(range(len(deltas))):
            if deltas[row].finish is not None:
                self._drop(row)
        return deltas

    def _delta(self, request: _TextRequest, token: int | None, logits: Tensor) -> Delta:
        """Return what a token adds; what fails for one request ends that request alone."""
        if token is None:
            return Delta(request.number, "", [], [], "error", error=NOT_FINITE)
        try:
            return self._advance(request, token, logits)
        except MiniGPTError:
            raise
        except BaseException as error:
            if not is_failure(error):
                raise
            reason = f"The tokenizer cannot decode the reply: {error!r}."
            return Delta(request.number, "", [], [], "error", error=reason)

    def _advance(self, request: _TextRequest, token: int, logits: Tensor) -> Delta:
        request.take(token)
        if token in self.engine.ends:
            text = request.stream.end()
            return Delta(
                request.number, text, [], request.released_logprobs(True), "stop", ended_by=token
            )
        if (count := request.sampling.logprobs) is not None:
            request.pending.append((request.stream.decoded, self._logprob(logits, token, count)))
        text = request.stream.add(token)
        finish: Finish | None = None
        if request.remaining == 0 and not request.stream.stopped:
            text += request.stream.end()
            finish = "length"
        if request.stream.stopped:
            finish = "stop"
        released = request.released_logprobs(finish is not None)
        return Delta(request.number, text, [token], released, finish)

    def _logprob(self, logits: Tensor, token: int, count: int) -> TokenLogprob:
        values = logits.float().log_softmax(-1)
        best = values.topk(min(count, len(values)))
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = [(index, self._pieces.text(index), value) for index, value in likeliest]
        text, utf8 = self._pieces.text(token), self._pieces.bytes(token)
        return TokenLogprob(text, token, float(values[token]), utf8, top)
