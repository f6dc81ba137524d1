"""Scores of answers by a reward model: of replies, of preference pairs, of several choices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice
from math import inf
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.data.batch import Sample, collate
from minigpt.data.chat import ChatCodec, refused_texts
from minigpt.data.formats import BadRows, Message, read_records
from minigpt.errors import ConfigError, ModelError
from minigpt.evaluate.baselines import by_length, by_words, cross_validated
from minigpt.evaluate.exam import Item
from minigpt.evaluate.likelihood import BATCH_TOKENS, grouped, samples
from minigpt.evaluate.preferences import length_bias
from minigpt.evaluate.scores import Score, share
from minigpt.infer.engine import Engine, Reply, Sampling
from minigpt.model.architecture import check_vocabulary, embedding_rows
from minigpt.model.pretrained import load_model, tokenizer_source
from minigpt.model.rope import max_positions, shared_prompt_limit
from minigpt.model.score_head import PackedReward, has_score_head
from minigpt.reading import refusing


class RewardScorer:
    """A reward model with its tokenizer, ready to score answers.

    Args:
        model: `...ForSequenceClassification` with one label.
        tokenizer: the one that belongs to it.

    Attributes:
        rows: how many token ids the model embeds.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.lm = PackedReward(model).eval()
        self.model = model
        self.tokenizer = tokenizer
        self.rows = embedding_rows(model)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> RewardScorer:
        """Load a reward model in fp32; an adapter directory brings its base.

        Args:
            path: run directory of a reward model, HF directory or hub id.
            device: by default the GPU where there is one, or else the CPU.
            tokenizer: of the ids that are to be scored.

        Raises:
            ModelError: when there is no reward model, or one with another tokenizer.
        """
        with refusing(f"The model at {path}", ModelError, seconds=inf, verb="cannot be used"):
            model = load_model(path, scores=True)
            if not has_score_head(model):
                raise ModelError(
                    f"The model at {path} is no reward model: it writes text and gives no scores. "
                    "Train one with: minigpt fit --config configs/reward.yaml"
                )
            saved = tokenizers.load(tokenizer_source(path))
            check_vocabulary(embedding_rows(model), saved)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)  # type: ignore[arg-type]
        scorer = cls(model, saved)
        if tokenizer is not None:
            scorer.check_tokenizer(tokenizer)
        return scorer

    @property
    def context(self) -> int:
        """How many tokens of a prompt and its answer the model reads at most."""
        return max_positions(self.model.config)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Refuse ids of another tokenizer.

        Raises:
            ModelError: when the vocabularies differ.
        """
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ModelError(
                f"The reward model at {self.model.config._name_or_path} has another tokenizer than "
                "the model whose replies it is to score. Train one from that model, or from one "
                "with its tokenizer: minigpt fit --config configs/reward.yaml "
                "--model.init_args.init_from MODEL"
            )

    def scores(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[float]:
        """Score answers at their last tokens; a prompt of several in a row is read once.

        Args:
            prompts: ids of each answer's prompt.
            answers: ids of the answers, with the token that ended each, if one did.

        Raises:
            ModelError: for an answer that, with its prompt, is longer than the model reads.
            ValueError: for an answer of no tokens.
        """
        if not all(map(len, answers)):
            raise ValueError("An answer without tokens has no last one at which to score it.")
        lengths = (len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        longest = max(lengths, default=0)
        if longest > self.context:
            raise ModelError(
                f"A prompt and its answer have {longest} tokens together, and the reward model at "
                f"{self.model.config._name_or_path} reads at most {self.context}. "
                "Shorten the prompt, or the longest answer (--max_new_tokens)."
            )
        groups: list[Sample] = []
        pairs = zip(prompts, answers, strict=True)
        for prompt, members in groupby(pairs, key=lambda pair: list(pair[0])):
            groups += self._samples(prompt, [list(answer) for _, answer in members])
        return [score for group in self.score(groups) for score in group]

    def _samples(self, prompt: list[int], answers: list[list[int]]) -> Iterator[Sample]:
        """Yield samples of a prompt and as many answers to it as fit into a batch."""
        if len(prompt) + max(map(len, answers)) > shared_prompt_limit(self.model.config):
            yield from (_sample([], [prompt + answer]) for answer in answers)
            return
        members: list[list[int]] = []
        for answer in answers:
            size = len(prompt) + sum(map(len, members)) + len(answer)
            if members and size > BATCH_TOKENS:
                yield _sample(prompt, members)
                members = []
            members.append(answer)
        yield _sample(prompt, members)

    @torch.no_grad()
    def score(self, samples: Iterable[Sample]) -> list[list[float]]:
        """Return the scores of each sample's answers."""
        results: list[list[float]] = []
        for members in grouped(self, samples, BATCH_TOKENS):
            device = self.model.device
            batch = collate(members, read_last=True).to(device)
            with torch.autocast(device.type, enabled=False):  # also within a step of training
                scores = iter(self.lm(batch).tolist())
            results += [[next(scores) for _ in sample.answers] for sample in members]
        return results


def _sample(prompt: list[int], answers: list[list[int]]) -> Sample:
    ids = np.array([*prompt, *(token for answer in answers for token in answer)])
    return Sample(ids, len(prompt), tuple(map(len, answers)), None, ("", 0))


def score_replies(
    scorer: RewardScorer,
    engine: Engine,
    prompts: Sequence[str | Sequence[Message]],
    replies: Sequence[Reply],
) -> list[float]:
    """Score an engine's replies, each with the token that ended it, as answers of training are.

    Raises:
        ModelError: when the reward model has another tokenizer than the engine.
    """
    scorer.check_tokenizer(engine.tokenizer)
    answers = [r.ids + ([] if r.ended_by is None else [r.ended_by]) for r in replies]
    encoded = [engine.encode(prompt) for prompt in prompts]
    return scorer.scores(encoded, answers)


def draw(
    engine: Engine, prompts: Sequence[str | Sequence[Message]], sampling: Sampling, count: int
) -> Iterator[list[Reply]]:
    """Yield so many replies to each prompt; the first has the sampling's seed, others the next."""
    samplings = [replace(sampling, seed=sampling.seed + number) for number in range(count)]
    repeated = [prompt for prompt in prompts for _ in samplings]
    replies = engine.replies(repeated, samplings * len(prompts))
    for _ in prompts:
        yield list(islice(replies, count))


def best_of(
    scorer: RewardScorer,
    engine: Engine,
    prompts: Sequence[str | Sequence[Message]],
    sampling: Sampling,
    count: int,
) -> Iterator[Reply]:
    """Yield of several replies to each prompt the one with the highest score.

    Args:
        scorer: the reward model.
        engine: writes the replies.
        prompts: texts to continue, or chats to answer.
        sampling: of the first reply; each further one has the next seed.
        count: how many replies are drawn for each prompt.

    Raises:
        ModelError: when the reward model has another tokenizer than the engine.
    """
    scorer.check_tokenizer(engine.tokenizer)
    drawn_replies = draw(engine, prompts, sampling, count)
    for prompt, drawn in zip(prompts, drawn_replies, strict=True):
        scores = score_replies(scorer, engine, [prompt] * count, drawn)
        yield drawn[scores.index(max(scores))]


def rank_pairs(scorer: RewardScorer, path: str, max_length: int) -> dict[str, Score]:
    """Measure a reward model on preference pairs.

    Args:
        scorer: the reward model.
        path: file of the pairs.
        max_length: tokens of a prompt with its longer answer; longer ones are cut.

    Returns:
        ``accuracy`` and ``margin`` of the scores; ``accuracy by length`` and ``accuracy by words``
        of the baselines, cross-validated on the same pairs; then how accuracy and margin depend on
        length (see `length_bias`).
    """
    refused = refused_texts(scorer.tokenizer, "preference")
    rows = read_records([path], "preference", BadRows(), special_tokens=refused)
    pairs = list(samples(scorer, "preference", rows, max_length))
    margins = np.array([chosen - rejected for chosen, rejected in scorer.score(pairs)])
    return {
        "accuracy": share((margins > 0).tolist(), 0.5),
        "margin": Score(float(margins.mean()), len(margins)),
        "accuracy by length": share(cross_validated(by_length, pairs), 0.5),
        "accuracy by words": share(cross_validated(by_words, pairs), 0.5),
        **length_bias(margins, np.array([pair.answers for pair in pairs])),
    }


def rank_choices(scorer: RewardScorer, items: Sequence[Item]) -> dict[str, Score]:
    """Let a reward model choose among several answers, the one with the highest score.

    Returns:
        ``accuracy``, and the mean of the right answer's rank, 1 for the first.
    """
    if not scorer.tokenizer.chat_template:
        raise ConfigError("This reward model has no chat template: it cannot read choices.")
    codec = ChatCodec(scorer.tokenizer)
    groups = [_choices(codec, item) for item in items]
    ranks = []
    for item, scores in zip(items, scorer.score(groups), strict=True):
        right = scores[item.choices.index(item.answer)]
        ranks.append(1 + sum(score > right for score in scores))
    chance_level = sum(1 / len(item.choices) for item in items) / len(items)
    return {
        "accuracy": share([rank == 1 for rank in ranks], chance_level),
        "rank of the right one": Score(float(np.mean(ranks)), len(ranks)),
    }


def _choices(codec: ChatCodec, item: Item) -> Sample:
    """Return an item as its prompt with all choices as answers."""
    prompt = item.prompt
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    turns = codec.plan_answers(messages, [Message("assistant", text) for text in item.choices])
    unit_ids = codec.encode_units([unit for turn in turns for text in turn.units for unit in text])
    prompts, answers = zip(*(codec.turn_ids(turn, unit_ids) for turn in turns), strict=True)
    return _sample(prompts[0], [answer.ids for answer in answers])
