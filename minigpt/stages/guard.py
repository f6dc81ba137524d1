"""Guarding the numbers: a loss that is not finite, and one that jumps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from minigpt.data.batch import PackedBatch
from minigpt.errors import ConfigError, TrainingError
from minigpt.model.parallel import gathered

log = logging.getLogger(__name__)

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


def unscale(scaler: GradScaler | None, optimizer: torch.optim.Optimizer) -> None:
    """Take the scale of fp16 out of the gradients, unless Lightning has done so.

    It leaves that to an optimizer whose own step does it, such as fused AdamW, where it comes
    after the norm is measured and clipped.
    """
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)


def may_step(
    number: int,
    loss: float,
    norm: float,
    window: Window,
    watch: LossWatch,
    scaler: GradScaler | None = None,
) -> bool:
    """Whether an optimizer step may be taken; every process comes to the same answer.

    Args:
        number: of the step, from 1.
        loss: mean over all targets of the step.
        norm: of the gradient.
        window: the step's micro-batches.
        watch: judges whether the loss jumps.
        scaler: fp16's, which leaves steps out whose gradients overflow, and lowers its scale.

    Raises:
        TrainingError: when the loss or the norm is not finite, the loss jumps and
            `spike.action` is stop, or gradients overflow in fp16 at any scale.
    """
    if scaler is not None and math.isfinite(loss) and not math.isfinite(norm):
        return check_scale(number, scaler.get_scale(), window)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise TrainingError(
            f"Step {number}: the loss is {loss:.4g} and the gradient's norm {norm:.4g}, so no "
            f"update was made. The rows: {window.rows()}. Look at them, lower the learning rate, "
            "or go on from the last good checkpoint with --ckpt_path auto."
        )
    action = watch.spike.action
    if action == "off" or not watch.jumps(loss):
        return True
    told = f"Step {number}: the loss jumped to {loss:.4g} (mean {watch.mean:.4g})"
    if action == "stop":
        raise TrainingError(f"{told}, and spike.action is stop. Rows: {window.rows()}.")
    skipped = action == "skip"
    log.warning("%s; rows: %s%s.", told, window.rows(), "; left out" if skipped else "")
    return not skipped


def check_scale(number: int, scale: float, window: Window) -> bool:
    """Let fp16's scaler leave out a step whose gradients overflowed.

    Raises:
        TrainingError: when they do so at a scale that makes nothing larger.
    """
    if scale <= 1:
        raise TrainingError(
            f"Step {number}: the gradients overflow in fp16 even at a loss scale of {scale:g}; the "
            f"steps before were left out while it was halved. The rows: {window.rows()}. Train "
            "with --trainer.precision bf16-mixed or 32-true, lower the learning rate, or go on "
            "from the last good checkpoint with --ckpt_path auto."
        )
    return True
