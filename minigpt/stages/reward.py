"""Reward models: a score for each answer, learnt from preferences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, NoReturn

import torch

from minigpt.data.batch import PackedBatch, Sample
from minigpt.data.datamodule import StoreSubset
from minigpt.data.formats import BatchKind
from minigpt.errors import ConfigError
from minigpt.evaluate.baselines import by_length, by_words
from minigpt.evaluate.scores import share
from minigpt.infer.engine import Sampling
from minigpt.model.losses import bradley_terry
from minigpt.model.packed_lm import PackedLM
from minigpt.model.score_head import PackedReward
from minigpt.model.source import ModelSource
from minigpt.stages.base import BaseModule, LossSums

WRITES_NOTHING = "A reward model gives answers scores and writes none:"


class RewardModule(BaseModule):
    """Give chosen answers higher scores than rejected ones (Bradley and Terry).

    The model is the body of the one that the run starts from with a new score head, which reads
    the last token of each answer; the run's `hf/` is transformers' `...ForSequenceClassification`.
    A pair's `margin` says by how much the chosen answer is to be ahead.

    Args:
        centering: weight of (r_c + r_r)², which keeps scores around 0; TRL's
            `center_rewards_coefficient`.
        kwargs: see `BaseModule`. `sample_prompts` and `sampling` are for models that write.
    """

    reads_last_tokens: ClassVar[bool] = True
    learns_from: ClassVar[tuple[BatchKind, ...]] = ("preference",)

    def __init__(self, centering: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= centering < math.inf:
            raise ConfigError(f"model.centering must be at least 0, but is {centering}.")
        if self.sample_prompts or self.sampling != Sampling():
            raise ConfigError(f"{WRITES_NOTHING} leave model.sample_prompts and sampling out.")
        self.centering = centering

    def model_source(self, from_options: Callable[..., ModelSource]) -> ModelSource:
        """Let the model that the run starts from have a score head."""
        return from_options(scores=True)

    def build_model(self) -> PackedLM:
        """Return the reward model, with a new head unless it starts from a reward model."""
        return PackedReward(self.source.build())

    def compute_loss(self, batch: PackedBatch) -> LossSums:
        """Return the summed loss of all pairs, and the sums behind its metrics."""
        learns = not batch.is_filler
        scores = self.model(batch, per_answer=True)
        margins = torch.tensor(batch.margins, device=scores.device)
        losses = bradley_terry(scores, margins, self.centering)
        chosen, rejected = scores.detach()[0::2], scores.detach()[1::2]
        metrics: dict[str, torch.Tensor | float] = {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margin": (chosen - rejected).sum(),
            "rewards/accuracy": (chosen > rejected).sum(),
        }
        return LossSums(losses.sum() * float(learns), len(losses) * learns, metrics)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out means, and what length and words alone tell of the same pairs."""
        super().on_validation_epoch_end()
        values = {f"val/{name}": value for name, value in self.baselines.items()}
        self.log_dict(values, rank_zero_only=True)

    @cached_property
    def baselines(self) -> dict[str, float]:
        """Held-out accuracy of what is fitted to lengths and to words of the training pairs."""
        data = self.data
        if not (data.train_subsets and data.val_subsets):
            return {}
        held_out = list(samples_of(data.val_subsets))
        return {
            f"accuracy_by_{name}": share(baseline(samples_of(data.train_subsets), held_out)).value
            for name, baseline in (("length", by_length), ("words", by_words))
        }

    # What only a model that writes can do

    def load_exam(self, path: str) -> NoReturn:
        """Refuse exams."""
        raise ConfigError(
            f"{WRITES_NOTHING} leave data.exam out to test it on the held-out pairs, or let it "
            "rank answers with: minigpt evaluate --reward_model"
        )

    def setup(self, stage: str) -> None:
        """Refuse to complete prompts."""
        if stage == "predict":
            raise ConfigError(
                f"{WRITES_NOTHING} minigpt generate --best_of N --reward_model DIR lets it choose "
                "among the replies of another model."
            )


def samples_of(subsets: Sequence[StoreSubset]) -> Iterator[Sample]:
    """Yield the samples of some files, one file after the other."""
    return chain.from_iterable(map(subset.sample, range(len(subset))) for subset in subsets)
