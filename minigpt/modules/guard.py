"""Guarding the numbers: a loss that is not finite, and one that jumps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from minigpt.data.batch import PackedBatch
from minigpt.errors import ConfigError
from minigpt.model.parallel import gathered

SETTLED = 20  # steps before a jump can be told from the start of training
MEMORY = 0.95  # of the running mean
NAMED = 5  # rows that an error names


@dataclass(frozen=True)
class Spike:
    """What to do when a step's loss jumps.

    Args:
        action: nothing, say so, leave the step out (weights and moments stay), or stop.
        factor: a jump is a loss above so many times the running mean.
    """

    action: Literal["off", "warn", "skip", "stop"] = "off"
    factor: float = 3.0

    def __post_init__(self) -> None:
        if self.factor <= 1:
            raise ConfigError(f"spike.factor must be above 1, but is {self.factor}.")


class LossWatch:
    """The running mean of a run's loss, by which a jump is judged."""

    def __init__(self, spike: Spike) -> None:
        self.spike, self.mean, self.steps = spike, 0.0, 0

    def jumps(self, loss: float) -> bool:
        """Whether a step's loss is a jump; if not, it enters the mean."""
        if self.steps >= SETTLED and loss > self.spike.factor * self.mean:
            return True
        self.steps += 1
        weight = MEMORY if self.steps > 1 else 0.0
        self.mean = weight * self.mean + (1 - weight) * loss
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and how many steps it has seen."""
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved mean."""
        self.mean, self.steps = state["mean"], state["steps"]


class Window:
    """The micro-batches of one optimizer step: their losses and the rows they came from.

    Attributes:
        resume_at: where the data goes on after the last of them, as (epoch, micro-batches).
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Sequence[tuple[str, int]]]] = []
        self.resume_at = (0, 0)

    def add(self, loss: Tensor, batch: PackedBatch) -> None:
        """Note a micro-batch."""
        self.parts.append((loss.detach(), batch.sources))
        self.resume_at = batch.resume_at

    def rows(self) -> str:
        """Return the rows behind losses that are not finite (else all), over all processes."""
        mine = [(bool(torch.isfinite(loss)), row) for loss, rows in self.parts for row in rows]
        every = gathered(mine)
        named = [row for finite, row in every if not finite] or [row for _, row in every]
        told = ", ".join(f"{file}:{line}" for file, line in named[:NAMED])
        return told + (f" and {len(named) - NAMED} more" if len(named) > NAMED else "")

    def clear(self) -> None:
        """Start over."""
        self.parts = []
