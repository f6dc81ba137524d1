"""LoRA: supervised fine-tuning of a low-rank adapter on a frozen model."""

from __future__ import annotations

from typing import Any

from minigpt.model.lora import Lora
from minigpt.stages.sft import SFTModule


class LoRAModule(SFTModule):
    """SFT that trains only an adapter; the run's `hf/` is an adapter directory.

    Args:
        lora: rank, scale, dropout and targets of the adapter.
        kwargs: see `BaseModule`.
    """

    def __init__(
        self,
        lora: Lora = Lora(),  # noqa: B008  (frozen)
        **kwargs: Any,
    ) -> None:
        super().__init__(lora=lora, **kwargs)
