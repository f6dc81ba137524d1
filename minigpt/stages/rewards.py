"""Rewards: which there are, their options, and the weighted sum by which answers are judged."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from transformers import TrainerState

from minigpt.errors import ConfigError, DataError
from minigpt.reading import LARGEST_CONFIG, read_json, refusing
from minigpt.stages.reward_function import FunctionReward
from minigpt.stages.reward_rules import (
    AnswerToScore,
    Exact,
    Json,
    Length,
    Numeric,
    Regex,
    Scorer,
    Scores,
)

RewardKind = Literal["exact", "numeric", "regex", "length", "json", "function", "reward_model"]

ANSWER = "answer"  # the field that exact and numeric compare with by default
# Which kinds have an option, and which kinds need it.
OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "field": (("exact", "numeric", "regex"), ()),
    "pattern": (("regex",), ("regex",)),
    "schema": (("json",), ()),
    "function": (("function",), ("function",)),
    "model": (("reward_model",), ("reward_model",)),
}


@dataclass(frozen=True)
class Reward:
    """A reward and what it weighs. See docs/grpo.md.

    Args:
        kind: exact (the answer is the field's text), numeric (its last number is the field's),
            regex (it contains a pattern), length (its tokens), json (it is JSON), function (a
            Python function with TRL's signature) or reward_model (a trained one).
        weight: factor in the sum of rewards; 0 only logs it.
        field: of the row, with which exact, numeric and regex compare; by default `answer` for the
            first two, and none for regex.
        pattern: regular expression of regex.
        schema: JSON Schema of json, or a file that holds one.
        function: package.module:name or file.py:name.
        model: directory of the reward model.

    Raises:
        ConfigError: when an option is missing, out of range, or not one of this kind.
    """

    kind: RewardKind
    weight: float = 1.0
    field: str | None = None
    pattern: str | None = None
    schema: dict[str, Any] | str | None = None
    function: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.kind not in get_args(RewardKind):
            listed = ", ".join(get_args(RewardKind))
            raise ConfigError(f"The reward {self.kind!r} is not known. There are {listed}.")
        if not isinstance(self.weight, int | float) or not math.isfinite(self.weight):
            raise ConfigError(
                f"The weight of the reward {self.kind} must be a number, but is {self.weight}."
            )
        for option, (kinds, needed) in OPTIONS.items():
            value = getattr(self, option)
            if value is None and self.kind in needed:
                raise ConfigError(f"The reward {self.kind} needs a {option}.")
            if value is not None and self.kind not in kinds:
                raise ConfigError(
                    f"{option} belongs to {' or '.join(kinds)}, not to the reward {self.kind}."
                )
        self._check_values()

    def _check_values(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ConfigError(
                    f"The pattern {self.pattern!r} of the reward regex is no regular expression: "
                    f"{error}."
                ) from None
        if isinstance(self.schema, dict):
            Json(self.schema)


class RewardModel(Protocol):
    """A trained model that scores answers."""

    def scores(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[float]:
        """Return a score for each answer to its prompt, both as token ids."""


class ModelReward(Scorer):
    """The score of a trained reward model, by the tokens that were sampled."""

    name = "reward_model"

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def score(self, answers: Sequence[AnswerToScore], state: TrainerState) -> Scores:
        """Score the answers."""
        prompts = [answer.prompt_ids for answer in answers]
        return Scores(self.model.scores(prompts, [answer.completion_ids for answer in answers]))


@dataclass(frozen=True)
class RewardTable:
    """What the R rewards of a run say of A answers.

    Attributes:
        unweighted: [R, A] of each reward; NaN if it cannot score an answer.
        metrics: what functions gave to `log_metric`.
    """

    unweighted: Tensor
    metrics: dict[str, float]


class Rewards:
    """The rewards of a run, ready to score.

    Args:
        rewards: at least one, with a weight that is not 0.
        load_model: loads the reward model of a directory.

    Attributes:
        names: of the rewards, for logs; all different.

    Raises:
        ConfigError: when a function, a schema or a model cannot be loaded, or nothing weighs.
    """

    def __init__(self, rewards: Sequence[Reward], load_model: Callable[[str], RewardModel]) -> None:
        if not any(reward.weight for reward in rewards):
            raise ConfigError(
                "model.rewards must hold at least one reward whose weight is not 0, such as "
                "[{kind: exact}]."
            )
        self.scorers = [scorer_of(reward, load_model) for reward in rewards]
        self.weights = [reward.weight for reward in rewards]
        names = [scorer.name for scorer in self.scorers]
        self.names = [
            name if names.count(name) == 1 else f"{name}_{names[: i + 1].count(name)}"
            for i, name in enumerate(names)
        ]

    def check_fields(self, fields: Mapping[str, object], path: str | Path, line: int) -> None:
        """Check that a row has the fields that the rewards need.

        Raises:
            DataError: with file, line and field, when it lacks one, or one cannot be used.
        """
        try:
            for scorer in self.scorers:
                scorer.check_fields(fields)
        except DataError as error:
            raise error.at(path, line) from None

    def score(self, answers: Sequence[AnswerToScore], step: int, max_steps: int) -> RewardTable:
        """Score answers.

        Args:
            answers: to any prompts.
            step: optimizer steps that have been made.
            max_steps: how many there will be.

        Raises:
            TrainingError: when a function raises, or returns what are no rewards.
        """
        state = TrainerState(global_step=step, max_steps=max_steps)
        scores = [scorer.score(answers, state) for scorer in self.scorers]
        unweighted = torch.tensor([one.values for one in scores], dtype=torch.float32)
        metrics: dict[str, float] = {}
        for one in scores:
            metrics |= one.metrics
        return RewardTable(unweighted, metrics)

    def total(self, unweighted: Tensor) -> Tensor:
        """Return the weighted sum over the rewards, the first dimension of [R, ...].

        It is NaN where a reward is, unless that one has the weight 0 and is only logged.
        """
        total = unweighted.new_zeros(unweighted.shape[1:])
        for weight, reward in zip(self.weights, unweighted, strict=True):
            if weight:
                total = total + weight * reward
        return total

    def __len__(self) -> int:
        return len(self.scorers)


def scorer_of(reward: Reward, load_model: Callable[[str], RewardModel]) -> Scorer:
    """Return what scores by a reward's options.

    Raises:
        ConfigError: when a function, a schema or a model cannot be loaded.
    """
    match reward.kind:
        case "exact":
            return Exact(reward.field or ANSWER)
        case "numeric":
            return Numeric(reward.field or ANSWER)
        case "regex":
            return Regex(str(reward.pattern), reward.field)
        case "length":
            return Length()
        case "json":
            return _json(reward.schema)
        case "function":
            return FunctionReward(str(reward.function))
        case "reward_model":
            return ModelReward(load_model(str(reward.model)))


def _json(schema: dict[str, Any] | str | None) -> Json:
    if not isinstance(schema, str):
        return Json(schema)
    with refusing(f"The schema {schema}", ConfigError, verb="cannot be read"):
        read = read_json(Path(schema), LARGEST_CONFIG)
    return Json(read, schema)
