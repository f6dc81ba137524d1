"""Rollouts: answers of the model in training to prompts, scored and packed for its update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from minigpt.data.batch import Sample
from minigpt.data.rollouts import EncodedPrompt, RolloutBatch, collate_rollouts, group_sample
from minigpt.infer.engine import Engine
from minigpt.infer.rollout import SampledAnswer, sample_groups
from minigpt.model.policy_losses import groups_with_signal
from minigpt.stages.collapse import repeated_ngrams
from minigpt.stages.reward_rules import AnswerToScore
from minigpt.stages.rewards import Rewards


@dataclass
class Answers:
    """Groups of answers with their rewards.

    Attributes:
        prompts: P prompts.
        groups: for each, G answers.
        texts: of the answers, without the token that ended them.
        unweighted: [R, P, G] each of R rewards; NaN where it cannot score an answer.
        rewards: [P, G] their weighted sums; NaN where one with a weight is.
        metrics: what reward functions gave to `log_metric`.
        redrawn: groups that were sampled again.
    """

    prompts: Sequence[EncodedPrompt]
    groups: list[list[SampledAnswer]]
    texts: list[list[str]]
    unweighted: Tensor
    rewards: Tensor
    metrics: dict[str, float]
    redrawn: int = 0

    def replace(self, numbers: Sequence[int], others: Answers) -> None:
        """Put other answers in the place of those to the prompts of these numbers."""
        for number, group, texts in zip(numbers, others.groups, others.texts, strict=True):
            self.groups[number] = group
            self.texts[number] = texts
        self.unweighted[:, numbers] = others.unweighted
        self.rewards[numbers] = others.rewards
        self.redrawn = max(self.redrawn, len(numbers))  # a later redraw has some of the same groups

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, [P, G]."""
        return torch.tensor([[len(answer.ids) for answer in group] for group in self.groups])

    @property
    def ended(self) -> Tensor:
        """Which answers were not cut off, [P, G] bool."""
        return torch.tensor([[answer.ended for answer in group] for group in self.groups])

    def sums(self, names: Sequence[str]) -> dict[str, Tensor | float]:
        """Return the sums from which `rollout_means` makes what is logged.

        Args:
            names: of the rewards.
        """
        scored = ~self.rewards.isnan()
        rewards = self.rewards.nan_to_num(0.0)
        means = rewards.sum(1, keepdim=True) / scored.sum(1, keepdim=True).clamp(min=1)
        ids = [answer.ids for group in self.groups for answer in group]
        by_name = list(zip(names, self.unweighted, strict=True))
        return {
            "answers": float(len(ids)),
            "scored": scored.sum(),
            "groups": float(len(self.groups)),
            "reward": rewards.sum(),
            "spread": torch.where(scored, rewards - means, 0.0).square().sum(),
            "without_signal": (~groups_with_signal(self.rewards)).sum(),
            "redrawn": float(self.redrawn),
            "length": self.lengths.sum(),
            "cut_off": (~self.ended).sum(),
            "repeated": repeated_ngrams(ids) * len(ids),  # a mean over answers
            **{f"reward/{name}": one.nan_to_num(0.0).sum() for name, one in by_name},
            **{f"scored/{name}": (~one.isnan()).sum() for name, one in by_name},
        }


@dataclass(frozen=True)
class RolloutSampler:
    """Samples and scores answers with the weights as they stand.

    Args:
        engine: over the model in training.
        rewards: score the answers.
        temperature: of sampling.
        longest: tokens of the longest answer.
        seed: of the run.
        progress: optimizer steps that were made, and how many there will be.
    """

    engine: Engine
    rewards: Rewards
    temperature: float
    longest: int
    seed: int
    progress: tuple[int, int]

    def sample(
        self, prompts: Sequence[EncodedPrompt], size: int, stream: int, redraws: int = 0
    ) -> Answers:
        """Sample a group of answers to each prompt.

        Args:
            prompts: to answer.
            size: answers to each.
            stream: a number that no other step has; an answer's random numbers depend on it, the
                run's seed, the prompt and the answer's number alone.
            redraws: how often groups without signal are sampled again.
        """
        answers = self._sample(prompts, size, stream, 0)
        for redraw in range(1, redraws + 1):
            without_signal = (~groups_with_signal(answers.rewards)).nonzero().flatten().tolist()
            if without_signal:
                again = [prompts[number] for number in without_signal]
                answers.replace(without_signal, self._sample(again, size, stream, redraw))
        return answers

    def greedy(self, prompts: Sequence[EncodedPrompt]) -> Answers:
        """Answer each prompt once, by the likeliest tokens."""
        return self._answers(prompts, [[0]] * len(prompts), 0.0)

    def _sample(
        self, prompts: Sequence[EncodedPrompt], size: int, stream: int, redraw: int
    ) -> Answers:
        seeds = [
            [answer_seed(self.seed, stream, prompt.number, redraw, i) for i in range(size)]
            for prompt in prompts
        ]
        return self._answers(prompts, seeds, self.temperature)

    def _answers(
        self, prompts: Sequence[EncodedPrompt], seeds: Sequence[Sequence[int]], temperature: float
    ) -> Answers:
        """Sample an answer to each prompt by each of its seeds, and score all."""
        ids = [prompt.ids for prompt in prompts]
        groups = sample_groups(self.engine, ids, seeds, temperature, self.longest)
        texts = [[self._text(answer) for answer in group] for group in groups]
        to_score = [
            AnswerToScore(
                prompt=prompt.record.content,
                prompt_ids=prompt.ids,
                completion=text,
                completion_ids=answer.ids,
                ended=answer.ended,
                fields=prompt.fields,
                source=prompt.record.source,
            )
            for prompt, group, of_group in zip(prompts, groups, texts, strict=True)
            for answer, text in zip(group, of_group, strict=True)
        ]
        table = self.rewards.score(to_score, *self.progress)
        shape = (len(prompts), -1)
        return Answers(
            prompts,
            groups,
            texts,
            table.unweighted.view(len(table.unweighted), *shape),
            self.rewards.total(table.unweighted).view(shape),
            table.metrics,
        )

    def _text(self, answer: SampledAnswer) -> str:
        ids = answer.ids[:-1] if answer.ended else answer.ids
        return str(self.engine.tokenizer.decode(ids))


def answer_seed(seed: int, stream: int, prompt: int, redraw: int, answer: int) -> int:
    """Return the seed of an answer's generator: the same in any batch, and after any restart."""
    words = np.random.SeedSequence([seed, stream, prompt, redraw, answer])
    return int(words.generate_state(1, np.uint64)[0])


def pack_answers(
    answers: Answers,
    which: slice,
    advantages: Tensor,
    included: Tensor,
    replay: Sequence[Sample],
) -> RolloutBatch:
    """Pack a micro-batch: the answers to some of the prompts, and chats of the replay.

    Args:
        answers: to all prompts.
        which: of the prompts.
        advantages, included: [P, G] of all answers.
        replay: the chats.
    """
    groups = answers.groups[which]
    return collate_rollouts(
        [
            group_sample(prompt, [answer.ids for answer in group])
            for prompt, group in zip(answers.prompts[which], groups, strict=True)
        ],
        [logprob for group in groups for answer in group for logprob in answer.logprobs],
        advantages[which].flatten().tolist(),
        included[which].flatten().tolist(),
        replay,
    )


def means_by_name(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each number over the processes that have it."""
    names = {name: None for of_process in metrics for name in of_process}
    return {name: fmean(m[name] for m in metrics if name in m) for name in names}


def rollout_means(totals: dict[str, float]) -> dict[str, float]:
    """Turn the sums of a rollout over all processes into what is logged.

    Means of rewards are over the answers that each could score; without any there is none.
    """
    answers, scored, groups = totals["answers"], totals["scored"], totals["groups"]
    counts = {"reward": scored}
    for name in totals:
        if name.startswith("reward/"):
            counts[name] = totals[f"scored/{name.removeprefix('reward/')}"]
    means = {name: totals[name] / count for name, count in counts.items() if count}
    if scored:
        means["rollout/spread"] = (totals["spread"] / scored) ** 0.5
    return {
        **means,
        **{f"rollout/{name}": totals[name] / answers for name in ("length", "cut_off", "repeated")},
        "rollout/without_signal": totals["without_signal"] / groups,
        "rollout/redrawn": totals["redrawn"] / groups,
        "rollout/not_scored": 1 - scored / answers,
        "rollout/seconds": totals["seconds"],
    }
