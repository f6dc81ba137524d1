"""Rollouts: several sampled answers to each prompt, as tokens with their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minigpt.errors import ModelError
from minigpt.infer.continuous_batch import NOT_FINITE, DecodingBatch, Request, check_fits
from minigpt.infer.engine import Engine
from minigpt.infer.sampling import Sampling, draw

SLOTS = {"cpu": 64, "cuda": 256}  # answers that are decoded at once


@dataclass(frozen=True)
class SampledAnswer:
    """An answer as it was sampled.

    Attributes:
        ids: its tokens, with the end token if one ended it.
        logprobs: of the tokens, in nats, by the distribution that they were drawn from: that of
            the logits over the temperature.
        ended: whether an end token ended it; otherwise it is cut off at the longest length, or at
            the end of the context.
    """

    ids: list[int]
    logprobs: list[float]
    ended: bool


class _Rollout(Request):
    def __init__(self, prompt: Sequence[int], sampling: Sampling, context: int) -> None:
        super().__init__(prompt, sampling, context)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.ended = False


class _RolloutBatch(DecodingBatch[_Rollout]):
    @torch.no_grad()
    def step(self) -> None:
        """Add a token to each active answer, and to those that get a slot."""
        logits = self._next_logits()
        if logits is None:
            return
        tokens, logprobs = draw(logits.float().cpu(), [rollout.sampler for rollout in self._rows])
        if not logprobs.isfinite().all():
            raise ModelError(NOT_FINITE)
        drawn = zip(self._rows, tokens.tolist(), logprobs.tolist(), strict=True)
        for rollout, token, logprob in drawn:
            rollout.take(token)
            rollout.ids.append(token)
            rollout.logprobs.append(logprob)
            rollout.ended = token in self.engine.ends
        for row in reversed(range(len(self._rows))):
            if self._rows[row].ended or self._rows[row].remaining == 0:
                self._drop(row)


def sample_groups(
    engine: Engine,
    prompts: Sequence[list[int]],
    seeds: Sequence[Sequence[int]],
    temperature: float,
    max_new_tokens: int,
) -> list[list[SampledAnswer]]:
    """Sample a group of answers to each prompt, with the engine's model as it stands.

    A prompt is read once for its group. Each answer has its own random generator, so that it
    depends neither on the other answers nor on the prompts given together, up to what the last
    digits of the logits decide (see `draw`).

    Args:
        engine: its model may be in training, and is afterwards as before.
        prompts: token ids of each.
        seeds: for each prompt, a seed for each answer.
        temperature: divides the logits; 0 takes the likeliest token.
        max_new_tokens: length of the longest answer, its end token included.

    Returns:
        For each prompt its answers, in the order of their seeds.

    Raises:
        ConfigError: for a prompt that fills the model's context, and numbers out of range.
        ModelError: when the model's logits are not finite.
    """
    groups = []
    for number, (ids, group_seeds) in enumerate(zip(prompts, seeds, strict=True), 1):
        check_fits(ids, engine.context, f"Prompt {number}: " if len(prompts) > 1 else "")
        samplings = [Sampling(max_new_tokens, temperature, seed=seed) for seed in group_seeds]
        groups.append([_Rollout(ids, sampling, engine.context) for sampling in samplings])
    slots = SLOTS.get(engine.model.device.type, SLOTS["cpu"])
    with engine.generating():
        batch = _RolloutBatch(engine, max(slots, *map(len, groups)) if groups else slots)
        for ids, group in zip(prompts, groups, strict=True):
            batch.enqueue(ids, group)
        while not batch.idle:
            batch.step()
    return [[SampledAnswer(r.ids, r.logprobs, r.ended) for r in group] for group in groups]
