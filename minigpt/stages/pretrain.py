"""Pretraining: predict every next token of a text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from minigpt.data.batch import PackedBatch
from minigpt.errors import ConfigError
from minigpt.model.architecture import Architecture, build_native, check_sizes, native_config
from minigpt.stages.base import BaseModule, Step, bits_per_byte


class PretrainModule(BaseModule):
    """Causal language modelling from random weights, or on from a model.

    Args:
        architecture: sizes of the native model; refused beside `init_from` where they differ from
            that model's.
        kwargs: see `BaseModule`.
    """

    needs_chat = False
    needs_start = False

    def __init__(
        self,
        architecture: Architecture = Architecture(),  # noqa: B008  (frozen)
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.init_from is None and self.tokenizer_path is None:
            raise ConfigError(
                "Set model.init_args.tokenizer to a tokenizer directory, or init_from to a model."
            )
        self.architecture = architecture

    def build(self) -> PreTrainedModel:
        """Return a native model with random weights, or the model to go on from."""
        if self.trained or self.init_from:
            return super().build()
        return self.scaled(build_native(self.architecture, self.tokenizer))

    def first_config(self) -> PreTrainedConfig:
        """Return the native model's config, or that of the model to go on from."""
        if self.trained or self.init_from:
            config = super().first_config()
            if self.trained is None:
                check_sizes(self.architecture, config)
            return config
        return native_config(self.architecture, self.tokenizer)

    def step(self, batch: PackedBatch) -> Step:
        """Return the summed cross-entropy of all next tokens, in nats."""
        return Step(self.model(batch), len(batch.labels))

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Add bits per byte."""
        return {**super().metrics(totals), "bits_per_byte": bits_per_byte(totals)}
