"""The optimizer step: what happens between the last backward pass and the update.

`finish_step` is the one to read; what it uses stands below it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from minigpt.data.batch import PackedBatch
from minigpt.errors import ConfigError, TrainingError
from minigpt.model.parallel import gathered

if TYPE_CHECKING:
    from minigpt.stages.base import BaseModule

log = logging.getLogger(__name__)

SETTLING_STEPS = 20  # before a jump can be distinguished from the start of training
MEAN_DECAY = 0.95  # of the running mean of the loss
ROWS_NAMED = 5  # in an error
SIGNAL = "signal/"  # + a signal's number: how many processes received it (runs/stopping.py)
INTERNAL_SUMS = ("count", "tokens", "bytes", "norm")  # are not logged as metrics


def finish_step(module: BaseModule, optimizer: torch.optim.Optimizer) -> None:
    """Turn the gradients of a step's micro-batches into those that the optimizer applies.

    Before: Lightning ran `training_step` and the backward pass of each micro-batch; it divided each
    loss by `accumulate_grad_batches`, and averaged the gradients over all processes.
    After: Lightning lets the optimizer update the weights, and steps the scheduler.

    Three divisions (by `loss_divisor` in `training_step`, and Lightning's two) are undone here and
    replaced by one, by the number of all targets (or pairs) of the step. So a short last step of an
    epoch, micro-batches of unequal size and another number of processes change nothing.

    Raises:
        TrainingError: when the loss or a gradient is not finite, the loss jumps and `spike.action`
            is stop, or fp16 cannot hold the gradients.
    """
    trainer, micro_batches = module.trainer, module.micro_batches
    scaler = unscale(module, optimizer)
    # With them, callbacks have added how many processes received a signal (runs/stopping.py).
    sums = micro_batches.sums.all_reduced()

    # The factor that makes the gradients those of the mean over all targets, and their norm then.
    lightning_divisor = trainer.accumulate_grad_batches * trainer.world_size
    scale = module.loss_divisor * lightning_divisor / sums["count"].clamp(min=1).float()
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = scale * gradient_norm(trainer.strategy, gradients)
    totals = to_floats({**sums, "norm": norm})  # one read-back for all of them

    # Check; then scale and clip in place.
    if check_step(trainer.global_step + 1, totals, micro_batches, module.loss_watch, scaler):
        clip, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        scale_and_clip(gradients, scale, norm, clip, algorithm)
    else:
        optimizer.zero_grad(set_to_none=True)  # without gradients, weights and moments stay

    # Note the position and log. Not sooner: a checkpoint describes the end of an optimizer step.
    module.data.advance(micro_batches.resume_at)
    module.log_step(totals)
    module.micro_batches = MicroBatches()


class Sums:
    """Named sums over micro-batches, accumulated on the device.

    A mean of means gives short batches too much weight. These are divided once, by the number of
    targets (or pairs) that they were summed over.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor | float], device: torch.device) -> None:
        """Add the sums of a micro-batch, scalars, in float64 where the device has it."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        zero = torch.zeros((), dtype=dtype, device=device)
        for name, value in values.items():  # adding a number, unlike copying it, does not wait
            value = value.detach() if isinstance(value, Tensor) else value
            self.values[name] = self.values.get(name, zero) + value

    def all_reduced(self) -> dict[str, Tensor]:
        """Return the sums over all processes, which must hold the same names."""
        distributed = torch.distributed
        if not (self.values and distributed.is_available() and distributed.is_initialized()):
            return self.values
        stacked = torch.stack(list(self.values.values()))
        distributed.all_reduce(stacked)
        return dict(zip(self.values, stacked.unbind(), strict=True))


def to_floats(values: dict[str, Tensor]) -> dict[str, float]:
    """Return scalars as numbers; the host waits for the device once, not for each of them."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


class MicroBatches:
    """What the micro-batches of the current optimizer step have added up to.

    Attributes:
        sums: of losses, targets and metrics.
        losses: of each micro-batch, with the rows that it came from.
        resume_at: where the data continues after the last of them, as (epoch, micro-batches).
    """

    def __init__(self) -> None:
        self.sums = Sums()
        self.losses: list[tuple[Tensor, Sequence[tuple[str, int]]]] = []
        self.resume_at = (0, 0)

    def add(self, loss: Tensor, batch: PackedBatch) -> None:
        """Note a micro-batch's loss and rows."""
        self.losses.append((loss.detach(), batch.sources))
        self.resume_at = batch.resume_at

    def describe_rows(self) -> str:
        """Return the rows behind losses that are not finite (else all), over all processes."""
        local = [(bool(torch.isfinite(loss)), row) for loss, rows in self.losses for row in rows]
        rows = gathered(local)
        named = [row for finite, row in rows if not finite] or [row for _, row in rows]
        listed = ", ".join(f"{file}:{line}" for file, line in named[:ROWS_NAMED])
        more = len(named) - ROWS_NAMED
        return listed + (f" and {more} more" if more > 0 else "")


@runtime_checkable
class ShardsGradients(Protocol):
    """A strategy whose processes hold different parts of the gradients."""

    def gradient_norm(self, gradients: list[Tensor]) -> Tensor:
        """Return the norm over all parts, a scalar."""


def gradient_norm(strategy: object, gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together, a scalar."""
    if isinstance(strategy, ShardsGradients):
        return strategy.gradient_norm(gradients)
    return torch.nn.utils.get_total_norm(gradients)


@dataclass(frozen=True)
class Spike:
    """What to do when a step's loss jumps.

    Args:
        action: `off` does nothing, `warn` logs it, `skip` leaves the step out (weights and moments
            stay), `stop` ends the run.
        factor: a jump is a loss above this many times the running mean.
    """

    action: Literal["off", "warn", "skip", "stop"] = "off"
    factor: float = 3.0

    def __post_init__(self) -> None:
        if self.factor <= 1:
            raise ConfigError(f"spike.factor must be above 1, but is {self.factor}.")


class LossWatch:
    """The running mean of a run's loss, by which a jump is judged."""

    def __init__(self, spike: Spike) -> None:
        self.spike = spike
        self.mean = 0.0
        self.steps = 0

    def observe(self, loss: float) -> bool:
        """Return whether a step's loss is a jump; add it to the mean if it is not."""
        if self.steps >= SETTLING_STEPS and loss > self.spike.factor * self.mean:
            return True
        self.steps += 1
        decay = MEAN_DECAY if self.steps > 1 else 0.0
        self.mean = decay * self.mean + (1 - decay) * loss
        return False

    def state_dict(self) -> dict[str, float]:
        """Return the mean and how many steps it has seen."""
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue with a saved mean."""
        self.mean = state["mean"]
        self.steps = int(state["steps"])


def unscale(module: BaseModule, optimizer: torch.optim.Optimizer) -> GradScaler | None:
    """Take fp16's loss scale out of the gradients, unless Lightning has done so.

    It leaves that to an optimizer whose own step does it, such as fused AdamW; that would come
    after the norm is measured and clipped.

    Returns:
        The scaler of fp16; None in other precisions.
    """
    scaler: GradScaler | None = getattr(module.trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimizer)
    return scaler


def check_step(
    step: int,
    totals: dict[str, float],
    micro_batches: MicroBatches,
    watch: LossWatch,
    scaler: GradScaler | None = None,
) -> bool:
    """Check the numbers of a step, and add its loss to the running mean.

    All processes come to the same answer.

    Args:
        step: number of the optimizer step, from 1.
        totals: sums over all processes, with `loss` and `count`, and the gradient's `norm`.
        micro_batches: name the rows in an error.
        watch: judges whether the loss jumps.
        scaler: fp16's GradScaler, which skips updates whose gradients overflow, and lowers its
            scale.

    Returns:
        False to skip the update.

    Raises:
        TrainingError: when the loss or the norm is not finite, the loss jumps and `spike.action`
            is stop, or gradients overflow in fp16 at any scale.
    """
    loss, norm = totals["loss"] / max(1.0, totals["count"]), totals["norm"]
    if scaler is not None and math.isfinite(loss) and not math.isfinite(norm):
        check_scale(step, scaler.get_scale(), micro_batches)
        return True  # the scaler leaves the update out
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise TrainingError(
            f"Step {step}: the loss is {loss:.4g} and the gradient's norm {norm:.4g}, so no "
            f"update was made. The rows: {micro_batches.describe_rows()}. Look at them, lower the "
            "learning rate, or go on from the last good checkpoint with --ckpt_path auto."
        )
    action = watch.spike.action
    if action == "off" or not watch.observe(loss):
        return True
    message = f"Step {step}: the loss jumped to {loss:.4g} (mean {watch.mean:.4g})"
    if action == "stop":
        raise TrainingError(
            f"{message}, and spike.action is stop. Rows: {micro_batches.describe_rows()}."
        )
    skipped = action == "skip"
    log.warning(
        "%s; rows: %s%s.", message, micro_batches.describe_rows(), "; left out" if skipped else ""
    )
    return not skipped


def check_scale(step: int, scale: float, micro_batches: MicroBatches) -> None:
    """Check that fp16's loss scale can still be lowered.

    Raises:
        TrainingError: when it is 1 or less, and the gradients still overflow.
    """
    if scale <= 1:
        raise TrainingError(
            f"Step {step}: the gradients overflow in fp16 even at a loss scale of {scale:g}; the "
            "steps before were left out while it was halved. The rows: "
            f"{micro_batches.describe_rows()}. Train with --trainer.precision bf16-mixed or "
            "32-true, lower the learning rate, or go on from the last good checkpoint with "
            "--ckpt_path auto."
        )


def scale_and_clip(
    gradients: list[Tensor],
    scale: Tensor,
    norm: Tensor,
    clip: float | None,
    algorithm: str | None,
) -> None:
    """Scale gradients in place, and clip what comes out.

    Args:
        gradients: tensors of any shapes, one for each parameter.
        scale: factor, a scalar.
        norm: of the scaled gradients, a scalar.
        clip: the bound, if any.
        algorithm: "value" bounds each number to -clip..clip; otherwise the norm is bounded.
    """
    by_value = algorithm == "value"
    if clip and not by_value:
        scale = scale * (clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)
    if clip and by_value:
        for gradient in gradients:
            gradient.clamp_(-clip, clip)
