"""How tokens are chosen: from the logits of a step to one token per request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.errors import ConfigError

FEW = 1024  # tokens that are tried before all are put in order


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    Args:
        max_new_tokens: length of the longest reply; what the context has no room for is cut.
        temperature: 0 takes the likeliest token.
        top_k: choose among so many tokens; 0 for all.
        top_p: choose among the likeliest tokens that hold this share of the probability.
        seed: of the request's own random generator.
        min_p: leave out tokens less likely than this share of the likeliest one.
        repetition_penalty: divides the positive logits of tokens that were already there, prompt
            included, and multiplies the negative ones; 1 changes nothing.
        stop: texts that end the reply; it holds none of them.
        logprobs: tell each token's log-prob and those of so many likeliest ones; None for none.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must be at least 0": self.temperature >= 0,
            "top_k must be at least 0": self.top_k >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "min_p must lie in [0, 1)": 0 <= self.min_p < 1,
            "repetition_penalty must be positive": 0 < self.repetition_penalty < math.inf,
            "a stop text must not be empty": all(self.stop),
            "logprobs must be at least 0": self.logprobs is None or self.logprobs >= 0,
        }
        for rule, kept in rules.items():
            if not kept:
                value = getattr(self, rule.split()[0], '""')
                raise ConfigError(f"sampling: {rule}, but is {value}.")

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken as the model has it."""
        return self.temperature == 0 and self.repetition_penalty == 1


class Chooser:
    """Chooses one request's tokens, with a random generator of its own.

    Args:
        sampling: how.
        prompt: ids that the repetition penalty counts as seen.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed % 2**63)
        self.seen = set(prompt) if sampling.repetition_penalty != 1 else None

    def choose(self, logits: Tensor) -> int:
        """Return the next token from its logits [V], in fp32 and on the CPU."""
        if self.seen is not None:
            logits = self._penalised(logits, self.seen)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            kept = filtered(logits, self.sampling)
            # In the order of the ids: one of the likeliest logits, off in its last digit, must
            # not change which random number belongs to which token.
            token = int(torch.multinomial(kept.softmax(-1), 1, generator=self.generator))
        if self.seen is not None:
            self.seen.add(token)
        return token

    def _penalised(self, logits: Tensor, seen: set[int]) -> Tensor:
        at = torch.tensor(sorted(seen))
        values, penalty = logits[at], self.sampling.repetition_penalty
        return logits.index_put((at,), torch.where(values > 0, values / penalty, values * penalty))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return logits [V] over the temperature, with -inf where a token may not be chosen."""
    scaled = (logits - logits.max()) / sampling.temperature
    cut = scaled.new_tensor(-math.inf)  # every filter keeps the tokens from some logit on
    if sampling.top_k or sampling.top_p < 1:
        cut = _cut(scaled, sampling.top_k or len(scaled), sampling.top_p)
    if sampling.min_p > 0:
        cut = cut.clamp(min=math.log(sampling.min_p))
    return scaled.masked_fill(scaled < cut, -math.inf)


def _cut(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the least of the logits [V] that top_k and top_p keep.

    A few tokens mostly hold top_p, and to put a whole vocabulary in order takes long.
    """
    every = top_k >= len(scaled)
    best = scaled.topk(min(FEW, len(scaled)) if every else top_k).values
    total = (scaled if every else best).logsumexp(-1)
    if every and (best - total).exp().sum() <= top_p:
        best = scaled.sort(descending=True).values
    if top_p == 1:
        return best[-1]
    before = (best - total).exp().cumsum(-1)[:-1]
    return best[int((before < top_p).sum())]


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Return each request's next token from logits [B, V]."""
    tokens: list[int] = logits.argmax(-1).tolist()
    if all(chooser.sampling.plain for chooser in choosers):
        return tokens
    rows = logits.float().cpu()
    return [
        token if chooser.sampling.plain else chooser.choose(row)
        for token, row, chooser in zip(tokens, rows, choosers, strict=True)
    ]
