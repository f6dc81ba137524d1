"""Pretraining: predict every next token of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minigpt.data.batch import PackedBatch
from minigpt.model.architecture import Architecture
from minigpt.model.source import ModelSource
from minigpt.stages.base import BaseModule, LossSums, bits_per_byte


class PretrainModule(BaseModule):
    """Causal language modelling from random weights, or on from a model.

    Args:
        architecture: sizes of the native model; refused beside `init_from` where they differ from
            that model's.
        kwargs: see `BaseModule`.
    """

    def __init__(
        self,
        architecture: Architecture = Architecture(),  # noqa: B008  (frozen)
        **kwargs: Any,
    ) -> None:
        self._architecture = architecture
        super().__init__(**kwargs)

    def model_source(self, from_options: Callable[..., ModelSource]) -> ModelSource:
        """Return random weights of the sizes given, or the model to go on from; without chats."""
        return from_options(architecture=self._architecture, chat=False)

    def compute_loss(self, batch: PackedBatch) -> LossSums:
        """Return the summed cross-entropy of all next tokens, in nats."""
        return LossSums(self.model(batch), len(batch.labels))

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Add bits per byte."""
        return {**super().metrics(totals), "bits_per_byte": bits_per_byte(totals)}
