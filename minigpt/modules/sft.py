"""Supervised fine-tuning: predict the assistant's turns of a chat."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minigpt.data.batch import PackedBatch
from minigpt.errors import ConfigError
from minigpt.modules.base import BaseModule, Step, bits_per_byte


class SFTModule(BaseModule):
    """Cross-entropy on assistant tokens and the token that ends their turn.

    Args:
        init_from: the model to start from.
        kwargs: see `BaseModule`.
    """

    def __init__(self, init_from: str | None = None, **kwargs: Any) -> None:
        if init_from is None:
            raise ConfigError(
                "Set model.init_args.init_from to the model to start from, such as "
                "outputs/pretrain."
            )
        super().__init__(init_from=init_from, **kwargs)

    def step(self, batch: PackedBatch) -> Step:
        """Return the summed cross-entropy of the assistant's tokens, in nats."""
        return Step(self.model(batch), len(batch.labels))

    def metrics(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Add bits per byte of the assistant's text."""
        return {**super().metrics(totals), "bits_per_byte": bits_per_byte(totals)}
