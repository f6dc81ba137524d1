"""Pretraining: predict every next token of a text."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from minigpt.data.batch import PackedBatch
from minigpt.errors import ConfigError
from minigpt.model.architecture import Architecture, build_native, check_sizes, native_config
from minigpt.model.growth import Growth, awake, check_growth, put_to_sleep
from minigpt.stages.base import BaseModule, Step, bits_per_byte


class PretrainModule(BaseModule):
    """Causal language modelling from random weights, or on from a model.

    Args:
        architecture: sizes of the native model; refused beside `init_from` where they differ from
            that model's.
        grow: train the first layers alone for a while (from random weights only).
        kwargs: see `BaseModule`.
    """

    needs_chat = False
    needs_start = False

    def __init__(
        self,
        architecture: Architecture = Architecture(),  # noqa: B008  (frozen)
        grow: Growth | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.init_from is None and self.tokenizer_path is None:
            raise ConfigError(
                "Set model.init_args.tokenizer to a tokenizer directory, or init_from to a model."
            )
        if grow is not None and self.init_from is not None:
            raise ConfigError(
                "model.init_args.grow starts from random weights: leave it or init_from out."
            )
        if grow is not None and grow.layers >= architecture.layers:
            raise ConfigError(
                f"grow.layers is {grow.layers}, but the model has {architecture.layers} layers: "
                "start with fewer, or leave grow out."
            )
        self.architecture, self.grow = architecture, grow

    def build(self) -> PreTrainedModel:
        """Return a native model with random weights, or the model to go on from."""
        if self.trained or self.init_from:
            return super().build()
        model = build_native(self.architecture, self.tokenizer)
        if self.grow:
            put_to_sleep(model, self.grow)
        return self.scaled(model)

    def first_config(self) -> PreTrainedConfig:
        """Return the native model's config, or that of the model to go on from."""
        if self.trained or self.init_from:
            config = super().first_config()
            if self.trained is None:
                check_sizes(self.architecture, config)
            return config
        return native_config(self.architecture, self.tokenizer)

    def configure_optimizers(self) -> Any:
        """See whether the model will grow, then as in every stage."""
        if self.grow:
            check_growth(self.grow, self.total_steps(), self.trainer.strategy)
        return super().configure_optimizers()

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Compute with the layers that are awake."""
        if self.grow is None:
            return super().training_step(batch, batch_idx)
        with awake(self.model.hf, self.grow, self.trainer.global_step):
            return super().training_step(batch, batch_idx)

    def step(self, batch: PackedBatch) -> Step:
        """Return the summed cross-entropy of all next tokens, in nats."""
        return Step(self.model(batch), len(batch.labels))

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Add bits per byte."""
        return {**super().metrics(totals), "bits_per_byte": bits_per_byte(totals)}
