"""What a run will do, logged before its first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from minigpt.model.architecture import count_parameters
from minigpt.runs.checkpoints import Checkpoints
from minigpt.stages.base import BaseModule

log = logging.getLogger(__name__)

MANY_EPOCHS = 20
FORWARD_SHARE = 1 / 3  # of a training step's computation: the backward pass costs two forwards


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes:
        parameters: of the model; `trainable` of them are trained.
        vocabulary: tokens.
        from_random: whether the weights begin at random.
        hardware: device, number of processes and precision in words.
        fast_precision: what the hardware multiplies fast.
        precision: what the run trains in.
        step_tokens: tokens of an optimizer step, at most.
        accumulate: micro-batches of a process in a step.
        steps: optimizer steps.
        epoch_tokens: tokens of an epoch.
        rates: optimizer, peak rates and schedule in words.
        held_out_tokens: of one validation; 0 for none.
        validations: how many, between the first step and the last.
        validated_every: how often in words.
        checkpoint_every: optimizer steps between two checkpoints.
        checkpoints_kept: which of them stay, in words.
        exported: which weights `hf/` will hold, in words.
    """

    parameters: int
    trainable: int
    vocabulary: int
    from_random: bool
    hardware: str
    fast_precision: str
    precision: str
    step_tokens: int
    accumulate: int
    steps: int
    epoch_tokens: int
    rates: str
    held_out_tokens: int
    validations: int
    validated_every: str
    checkpoint_every: int
    checkpoints_kept: str
    exported: str

    @property
    def tokens(self) -> int:
        """Tokens of the run, counting each as often as it is read."""
        return self.steps * self.step_tokens

    @property
    def epochs(self) -> float:
        """How often the run reads each token."""
        return self.tokens / max(1, self.epoch_tokens)

    def lines(self) -> Iterator[str]:
        """Yield the plan, a topic a line."""
        trained = "all" if self.trainable == self.parameters else f"{self.trainable:,}"
        yield (
            f"Model: {self.parameters:,} parameters, {trained} of them trained; "
            f"{self.vocabulary:,} tokens in the vocabulary"
        )
        yield f"Hardware: {self.hardware}, {self.precision}"
        yield (
            f"Length: {self.steps:,} steps of up to {self.step_tokens:,} tokens "
            f"({self.accumulate} micro-batch(es) a process), {self.tokens:,} tokens in all, "
            f"{self.epochs:.3g} epochs, {self.tokens / self.parameters:.2g} tokens a parameter"
        )
        yield f"Rates: {self.rates}"
        yield (
            f"Validation: {self.held_out_tokens:,} tokens, {self.validated_every}"
            if self.held_out_tokens
            else "Validation: none"
        )
        saved = f"every {self.checkpoint_every:,} steps"
        if self.checkpoint_every >= self.steps:
            saved = "at the end alone"
        yield f"Checkpoints: {saved}, {self.checkpoints_kept}; hf/ will hold the {self.exported}"

    def warnings(self) -> Iterator[str]:
        """Yield what is unlikely to be meant, each with what to do about it."""
        if self.precision == "32-true" != self.fast_precision:
            yield (
                f"This hardware computes {self.fast_precision} faster than fp32: "
                "--trainer.precision null takes it."
            )
        if self.from_random and self.tokens < self.parameters:
            yield (
                f"From random weights the run reads {self.tokens / self.parameters:.2g} tokens a "
                "parameter; about 20 are usual (Hoffmann et al. 2022). A model for general use "
                "needs more data and steps."
            )
        if self.epochs > MANY_EPOCHS:
            yield (
                f"The run reads the same data {self.epochs:.0f} times and will learn it by heart. "
                "Lower trainer.max_steps, or add data."
            )
        if self.validations * self.held_out_tokens * FORWARD_SHARE > self.tokens:
            yield (
                "Validation takes longer than training. Hold out less (data.val, data.val_share), "
                "or raise validate.every."
            )


class RunPlan(Callback):
    """Logs the plan of a `fit` when all of it is settled.

    Args:
        checkpoints: when they are saved.
        fast_precision: what the hardware multiplies fast.
    """

    def __init__(self, checkpoints: Checkpoints, fast_precision: str) -> None:
        self.checkpoints = checkpoints
        self.fast_precision = fast_precision

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log it, on the first process."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, BaseModule)
        plan = self.plan(trainer, pl_module)
        for line in plan.lines():
            log.info("%s", line)
        for line in plan.warnings():
            log.warning("%s", line)

    def plan(self, trainer: Trainer, module: BaseModule) -> Plan:
        """Return the run's numbers."""
        data, options = module.data, module.optimizer_options
        accumulate = trainer.accumulate_grad_batches
        steps = module.total_steps()
        parameters, trainable = count_parameters(module.model)
        processes = f"{trainer.world_size} processes" if trainer.world_size > 1 else "1 process"
        rates = f"{options.name} {options.lr:g}"
        if options.name == "muon":
            rates += f", adamw {options.adamw_lr:g} beside it"
        step_tokens = data.tokens_per_batch * accumulate * trainer.world_size
        epoch_tokens = data.epoch_tokens()
        interval = trainer.val_check_interval  # in micro-batches, or 1.0 for an epoch
        if isinstance(interval, int):
            validations = steps * accumulate // interval
            validated_every = f"every {interval / accumulate:g} steps"
        else:
            validations = steps * step_tokens // max(1, epoch_tokens)
            validated_every = "at the end of each epoch"
        saving = self.checkpoints.options
        kept = "all are kept" if saving.keep == "all" else f"the last {saving.keep} are kept"
        if saving.best is not None:
            kept += f", and the best by {saving.best}"
        return Plan(
            parameters=parameters,
            trainable=trainable,
            vocabulary=len(module.tokenizer),
            from_random=module.start.init_from is None,
            hardware=f"{trainer.strategy.root_device.type}, {processes}",
            fast_precision=self.fast_precision,
            precision=str(trainer.precision),
            step_tokens=step_tokens,
            accumulate=accumulate,
            steps=steps,
            epoch_tokens=epoch_tokens,
            rates=f"{rates}, {module.schedule_options.name}",
            held_out_tokens=data.held_out_tokens() if trainer.enable_validation else 0,
            validations=validations,
            validated_every=validated_every,
            checkpoint_every=saving.every,
            checkpoints_kept=kept,
            exported=saving.export,
        )
