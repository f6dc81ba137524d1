"""Sampling: from the logits of a step to one token for each request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.errors import ConfigError

PARTIAL_SORT = 1024  # likeliest tokens that are sorted, and all only where these are too few
# Dividing by less could give 0/0 in fp32, and by more -inf/inf. At the first temperature already, a
# token whose logit is lower by 1e-4 is never drawn; at the second all are as likely.
LEAST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-6, 1e30
PENALTIES = (0.01, 100)  # beyond, penalised logits could overflow fp32


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a reply are drawn, and when it ends.

    Args:
        max_new_tokens: length of the longest reply; what the context has no room for is cut.
        temperature: 0 takes the likeliest token.
        top_k: draw from so many of the likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens that hold this share of the probability (Holtzman et
            al. 2020, arXiv:1904.09751).
        seed: seeds the random generator of the request.
        min_p: leave out tokens whose probability is below this share of the likeliest one's (Nguyen
            et al. 2024, arXiv:2407.01082).
        repetition_penalty: divides the positive logits of tokens that occurred before, prompt
            included, and multiplies the negative ones (Keskar et al. 2019, arXiv:1909.05858); 1
            changes nothing.
        stop: texts that end the reply; it holds none of them.
        logprobs: return each token's log-prob and those of so many likeliest ones; None for none.
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
            "temperature must be at least 0, and finite": 0 <= self.temperature < math.inf,
            "top_k must be at least 0": self.top_k >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "min_p must lie in [0, 1)": 0 <= self.min_p < 1,
            f"repetition_penalty must lie in [{PENALTIES[0]}, {PENALTIES[1]}]": (
                PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1]
            ),
            "a stop text must not be empty": all(self.stop),
            "logprobs must be at least 0": self.logprobs is None or self.logprobs >= 0,
        }
        for rule, holds in rules.items():
            if not holds:
                value = getattr(self, rule.split()[0], '""')  # the field that begins the rule
                raise ConfigError(f"sampling: {rule}, but is {value}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, by the model's own logits."""
        return self.temperature == 0 and self.repetition_penalty == 1

    @property
    def unfiltered(self) -> bool:
        """Whether tokens are drawn from the whole distribution, only sharpened or flattened."""
        all_tokens = self.top_k == 0 and self.top_p == 1 and self.min_p == 0
        return self.temperature > 0 and all_tokens and self.repetition_penalty == 1


class Sampler:
    """Draws the tokens of one request, with its own random generator.

    Args:
        sampling: temperature, filters, penalty and seed.
        prompt: ids that the repetition penalty counts as seen.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.generator = torch.Generator().manual_seed(sampling.seed % 2**63)
        self.seen = set(prompt) if sampling.repetition_penalty != 1 else None

    def sample(self, logits: Tensor) -> int:
        """Return the next token from logits [V] in fp32 on the CPU, the largest of them finite."""
        if self.seen is not None:
            logits = self._penalised(logits, self.seen)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = filtered(logits, self.sampling).softmax(-1)
            # In the order of the ids: one of the likeliest logits, off in its last digit, must
            # not change which random number belongs to which token.
            token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        if self.seen is not None:
            self.seen.add(token)
        return token

    def _penalised(self, logits: Tensor, seen: set[int]) -> Tensor:
        ids = torch.tensor(sorted(seen))
        values = logits[ids]
        penalty = self.sampling.repetition_penalty
        penalised = torch.where(values > 0, values / penalty, values * penalty)
        largest = torch.finfo(logits.dtype).max  # what overflows must not make all others NaN
        return logits.index_put((ids,), penalised.clamp(-largest, largest))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return logits [V] over the temperature, with -inf where a token may not be drawn."""
    scaled = (logits - logits.max()) / _bounded(sampling.temperature)
    lowest = scaled.new_tensor(-math.inf)  # of the logits that all filters keep
    if sampling.top_k or sampling.top_p < 1:
        lowest = _lowest_kept(scaled, sampling.top_k or len(scaled), sampling.top_p)
    if sampling.min_p > 0:
        lowest = lowest.clamp(min=math.log(sampling.min_p))  # the largest logit is 0
    return scaled.masked_fill(scaled < lowest, -math.inf)


def _bounded(temperature: float) -> float:
    return min(max(temperature, LEAST_TEMPERATURE), HIGHEST_TEMPERATURE)


def _lowest_kept(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the lowest of the logits [V] that top_k and top_p keep.

    A few tokens mostly hold top_p, and sorting all of a vocabulary takes long.
    """
    without_k = top_k >= len(scaled)
    best = scaled.topk(min(PARTIAL_SORT, len(scaled)) if without_k else top_k).values
    total = (scaled if without_k else best).logsumexp(-1)
    if without_k and (best - total).exp().sum() <= top_p:
        best = scaled.sort(descending=True).values
    if top_p == 1:
        return best[-1]
    before = (best - total).exp().cumsum(-1)[:-1]
    return best[int((before < top_p).sum())]


def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """Return each request's next token from logits [B, V]; None where they make no distribution.

    They make none where one is NaN or infinite, or all are -inf. `argmax` finds NaN first, so that
    the logit of the token it returns is finite in all other cases.
    """
    best = logits.argmax(-1, keepdim=True)
    finite = logits.gather(-1, best).isfinite().flatten().tolist()
    tokens: list[int | None] = best.flatten().tolist()
    tokens = [token if valid else None for token, valid in zip(tokens, finite, strict=True)]
    if all(sampler.sampling.greedy for sampler in samplers):
        return tokens
    rows = logits.float().cpu()
    unfiltered = [i for i, s in enumerate(samplers) if s.sampling.unfiltered and finite[i]]
    if unfiltered:
        drawn, _ = draw(rows[unfiltered], [samplers[i] for i in unfiltered])
        for i, token in zip(unfiltered, drawn.tolist(), strict=True):
            tokens[i] = token
    for i, sampler in enumerate(samplers):
        if finite[i] and not (sampler.sampling.greedy or sampler.sampling.unfiltered):
            tokens[i] = sampler.sample(rows[i])
    return tokens


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[Tensor, Tensor]:
    """Draw a token for each request by its temperature alone.

    The token is the argmax of p / e, with e from an exponential distribution for each token of the
    vocabulary, by the request's own generator: what `torch.multinomial` computes for one row.
    All is computed row by row, so a row's token is the same in any batch of the same logits.
    Where those differ in their last digits, as matmuls of other shapes give them, it is another
    only if the best two of p / e are as close.

    Args:
        logits: [B, V] in fp32 on the CPU.
        samplers: of the rows.

    Returns:
        The tokens [B], and their log-probabilities [B] in nats by the distribution over the
        temperature; they are NaN in rows that make no distribution.
    """
    temperatures = [_bounded(sampler.sampling.temperature) for sampler in samplers]
    scaled = (logits - logits.amax(-1, True)) / torch.tensor(temperatures)[:, None]
    probabilities = scaled.softmax(-1)
    # What `exponential_` gives, in a third of its time: the logarithms of all rows at once.
    noise = torch.empty(probabilities.shape, dtype=torch.float64)
    for row, sampler in zip(noise, samplers, strict=True):
        row.uniform_(generator=sampler.generator)
    noise = noise.neg_().log1p_().neg_().float()
    tokens = (probabilities / noise).max(-1, keepdim=True).indices
    return tokens.flatten(), probabilities.gather(-1, tokens).log().flatten()
