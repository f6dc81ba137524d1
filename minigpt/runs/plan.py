"""What a run will do, logged before its first step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Timer

from minigpt.data.bundled import is_bundled
from minigpt.model.architecture import count_parameters
from minigpt.runs.checkpoints import Checkpoints
from minigpt.runs.demo import MOST_PARAMETERS, demo_files, demo_prompts
from minigpt.runs.memory import expected_memory
from minigpt.stages.base import BaseModule
from minigpt.terminal import counted

log = logging.getLogger(__name__)

MANY_EPOCHS = 20
LONG = 1e14  # floating-point operations: some minutes on a CPU
STEPS_TIMED, SECONDS_TIMED = 20, 60  # the time to the end is logged after either
FORWARD_SHARE = 1 / 3  # of a training step's computation: the backward pass costs two forwards


@dataclass(frozen=True)
class Plan:
    """The numbers of a run.

    Attributes:
        parameters: of the model; `trainable` of them are trained.
        vocabulary: tokens.
        from_random: whether training starts from random weights.
        device: what computes, such as "cpu".
        fast_precision: what the hardware multiplies fast.
        precision: what the run trains in.
        micro_batch_tokens: tokens of a micro-batch, at most.
        accumulate: micro-batches of a process in a step.
        processes: that compute micro-batches side by side.
        steps: optimizer steps.
        epoch_tokens: tokens of an epoch.
        epoch_steps: optimizer steps of an epoch.
        rates: optimizer, peak rates and schedule in words.
        held_out_tokens: of one validation; 0 for none.
        held_out_source: what they are a part of, in words.
        validations: how many, those before the first step and of the last weights included.
        validated_every: how often, in words.
        checkpoint_every: optimizer steps between two checkpoints.
        retention: which of them stay, in words.
        exported: which weights `hf/` will hold, in words.
        memory: the expected peak, in words; "" where it is not known.
        demo_files: data of the demo in a run that is not the demo.
        demo_prompts: sample prompts of the demo in such a run.
    """

    parameters: int
    trainable: int
    vocabulary: int
    from_random: bool
    device: str
    fast_precision: str
    precision: str
    micro_batch_tokens: int
    accumulate: int
    processes: int
    steps: int
    epoch_tokens: int
    epoch_steps: int
    rates: str
    held_out_tokens: int
    held_out_source: str
    validations: int
    validated_every: str
    checkpoint_every: int
    retention: str
    exported: str
    memory: str = ""
    demo_files: Sequence[str] = ()
    demo_prompts: Sequence[str] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the run, counting each as often as it is read."""
        return round(self.epochs * self.epoch_tokens)

    @property
    def epochs(self) -> float:
        """How often the run reads each token."""
        return self.steps / self.epoch_steps

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step, at most."""
        return self.micro_batch_tokens * self.accumulate * self.processes

    def lines(self) -> Iterator[str]:
        """Yield the plan, a topic a line."""
        epochs = f"{self.epochs:.3g} epoch" + ("s" if self.epochs != 1 else "")
        processes = f"{self.processes} process" + ("es" if self.processes > 1 else "")
        trained = "all" if self.trainable == self.parameters else f"{self.trainable:,}"
        yield (
            f"Model: {self.parameters:,} parameters, {trained} of them trained; "
            f"{self.vocabulary:,} tokens in the vocabulary"
        )
        yield f"Hardware: {self.device}, {processes}, {self.precision}"
        yield (
            f"Length: {self.steps:,} steps of up to {self.step_tokens:,} tokens "
            f"({self.micro_batch_tokens:,} a micro-batch x {self.accumulate} accumulated x "
            f"{processes}), {self.tokens:,} tokens in all, "
            f"{epochs}, {self.tokens / self.parameters:.2g} tokens a parameter"
        )
        yield f"Rates: {self.rates}"
        held_out = f"{self.held_out_tokens:,} tokens{self.held_out_source}, {self.validated_every}"
        yield f"Validation: {held_out if self.held_out_tokens else 'none'}"
        saved = f"every {self.checkpoint_every:,} steps"
        if self.checkpoint_every >= self.steps:
            saved = "at the end alone"
        yield f"Checkpoints: {saved}, {self.retention}; hf/ will hold the {self.exported}"
        if self.memory:
            yield f"Memory: {self.memory}"

    def warnings(self) -> Iterator[str]:
        """Yield what is unlikely to be meant, each with what to do about it."""
        yield from self._wasteful()
        if self.checkpoint_every >= self.steps and self.operations > LONG:
            yield (
                f"The run of {self.steps:,} steps saves no checkpoint before its end: what ends it "
                "by force loses all of it. Lower checkpoint.every."
            )
        if self.demo_files:
            yield (
                f"This run is not the demo, and reads the demo's data, an invented world: "
                f"{', '.join(self.demo_files)}. Give your own (data.train, data.val, data.exam)."
            )
        if self.demo_prompts:
            yield (
                f"The run asks the demo's sample prompts ({', '.join(self.demo_prompts)}). Set "
                "model.sample_prompts to some that its data can answer."
            )

    @property
    def operations(self) -> float:
        """About how many floating-point operations training takes: 6 a parameter and token."""
        return 6.0 * self.parameters * self.tokens

    def _wasteful(self) -> Iterator[str]:
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
                "Lower trainer.max_epochs or max_steps, or add data."
            )
        if self.validations * self.held_out_tokens * FORWARD_SHARE > self.tokens:
            yield (
                "Validation takes longer than training: it reads "
                f"{self.validations * self.held_out_tokens:,} tokens in all. Lower "
                "data.max_val_tokens, or raise validate.every."
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
        self.step = 0  # the last one done
        self.timed_from = 0  # the step after which `started` is taken
        self.started = 0.0  # seconds of the monotonic clock
        self.is_timed = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log it, on the first process."""
        assert isinstance(pl_module, BaseModule)
        if not trainer.is_global_zero or pl_module.data.order is None:  # a run that is refused
            return
        plan = self.plan(trainer, pl_module)
        for line in plan.lines():
            log.info("%s", line)
        for line in plan.warnings():
            log.warning("%s", line)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the run begins."""
        self.step = trainer.global_step
        self.timed_from = self.step + 1  # the first step is slower: it compiles and allocates

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Log the time to the end, once, after some steps; validations between them count."""
        assert isinstance(pl_module, BaseModule)
        is_step = trainer.global_step > self.step
        self.step = trainer.global_step
        if not is_step or self.is_timed or not trainer.is_global_zero:
            return
        if self.step == self.timed_from:
            self.started = time.monotonic()
            return
        steps, seconds = self.step - self.timed_from, time.monotonic() - self.started
        steps_left = pl_module.total_steps() - self.step
        if (steps < STEPS_TIMED and seconds < SECONDS_TIMED) or steps_left <= 0:
            return
        self.is_timed = True
        took = f"{counted(steps, 'step')} took {duration(seconds)}"
        allowed, expected = seconds_allowed(trainer), seconds / steps * steps_left
        if allowed < expected:
            log.info("%s: trainer.max_time ends the run in about %s.", took, duration(allowed))
        else:
            log.info("%s: about %s to the end.", took, duration(expected))

    def plan(self, trainer: Trainer, module: BaseModule) -> Plan:
        """Return the run's numbers."""
        data, options = module.data, module.optimizer_options
        accumulate = trainer.accumulate_grad_batches
        steps = module.total_steps()
        parameters, trainable = count_parameters(module.model)
        rates = f"{options.name} {options.lr:g}"
        if options.name == "muon":
            rates += f", adamw {options.adamw_lr:g} beside it"
        epoch_steps = max(1, -(-data.epoch_micro_batches() // (accumulate * trainer.world_size)))
        interval = trainer.val_check_interval  # in micro-batches, or 1.0 for an epoch
        if isinstance(interval, int):
            validations = math.ceil(steps * accumulate / interval)
            validated_every = f"every {interval / accumulate:g} steps"
            if accumulate > 1:
                validated_every += f" ({interval:,} micro-batches of a process)"
        else:
            validations = math.ceil(steps / epoch_steps)
            validated_every = "at the end of each epoch"
        if trainer.num_sanity_val_steps == math.inf:  # all of the validation before the first step
            validations += 1
        is_demo = all(map(is_bundled, data.train_weights)) and parameters <= MOST_PARAMETERS
        files = [*data.train_weights, *data.val_files, *data.exam]
        memory = expected_memory(module)
        saving = self.checkpoints.options
        retention = "all are kept" if saving.keep == "all" else f"the last {saving.keep} are kept"
        if saving.best is not None:
            retention += f", and the best by {saving.best}"
        return Plan(
            parameters=parameters,
            trainable=trainable,
            vocabulary=len(module.tokenizer),
            from_random=module.start.init_from is None,
            device=trainer.strategy.root_device.type,
            fast_precision=self.fast_precision,
            precision=str(trainer.precision),
            micro_batch_tokens=data.tokens_per_batch,
            accumulate=accumulate,
            processes=trainer.world_size,
            steps=steps,
            epoch_tokens=data.epoch_tokens(),
            epoch_steps=epoch_steps,
            rates=f"{rates}, {module.schedule_options.name}",
            held_out_tokens=data.held_out_tokens() if trainer.enable_validation else 0,
            held_out_source=data.held_out_source(),
            validations=validations,
            validated_every=validated_every,
            checkpoint_every=saving.every,
            retention=retention,
            exported=saving.export,
            memory="" if memory is None else str(memory),
            demo_files=() if is_demo else demo_files(files),
            demo_prompts=() if is_demo else demo_prompts(module.sample_prompts),
        )


def seconds_allowed(trainer: Trainer) -> float:
    """Return the seconds until trainer.max_time ends the run, 0 or more; infinity without it."""
    timers = (callback for callback in trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in timers]
    return min((max(0.0, seconds) for seconds in left if seconds is not None), default=math.inf)


def duration(seconds: float) -> str:
    """Return a time as text, in the unit that fits."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
