"""Supervised fine-tuning: predict the assistant's turns of a chat."""

from __future__ import annotations

from minigpt.data.batch import PackedBatch
from minigpt.stages.base import BaseModule, LossSums, bits_per_byte


class SFTModule(BaseModule):
    """Cross-entropy on assistant tokens and the token that ends their turn."""

    def compute_loss(self, batch: PackedBatch) -> LossSums:
        """Return the summed cross-entropy of the assistant's tokens, in nats."""
        return LossSums(self.model(batch), len(batch.labels))

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Add bits per byte of the assistant's text."""
        return {**super().metrics(totals), "bits_per_byte": bits_per_byte(totals)}
