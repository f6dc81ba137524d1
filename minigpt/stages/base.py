"""What every stage shares: a loss as a sum, divided once by what it was summed over.

A stage subclasses `BaseModule` and writes `compute_loss`: from a packed batch to the sum of its
losses, the number of terms, and the sums behind its metrics. The optimizer step is in step.py,
building and saving the model in setup.py, exams and predictions in evaluation.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from minigpt.data.batch import PackedBatch
from minigpt.data.datamodule import JSONLDataModule
from minigpt.data.formats import BatchKind
from minigpt.errors import ConfigError
from minigpt.infer.engine import Sampling
from minigpt.model.lora import Lora
from minigpt.model.optimizer import OptimizerOptions, ScheduleOptions
from minigpt.model.packed_lm import PackedLM
from minigpt.model.rope import RopeScaling
from minigpt.model.source import ModelSource
from minigpt.stages.evaluation import EvaluationHooks
from minigpt.stages.setup import ModelHooks
from minigpt.stages.step import (
    INTERNAL_SUMS,
    SIGNAL,
    LossWatch,
    MicroBatches,
    Spike,
    Sums,
    finish_step,
    to_floats,
)

DATA_OF: dict[BatchKind, str] = {  # the DataModule of each kind of batches
    "text": "PretrainDataModule",
    "chat": "SFTDataModule",
    "preference": "DPODataModule",
    "unpaired": "KTODataModule",
    "prompt": "GRPODataModule",
}


@dataclass
class LossSums:
    """Loss, number of terms and metrics of one micro-batch, as sums.

    Attributes:
        loss: sum of the losses, a scalar; its gradient trains the model.
        count: how many terms it sums: targets, or pairs.
        metrics: sums behind the stage's metrics, scalars; logged divided by `count`. The same
            names in every process, and none that `BaseModule` uses.
    """

    loss: Tensor
    count: int
    metrics: dict[str, Tensor | float] = field(default_factory=dict)


class BaseModule(ModelHooks, EvaluationHooks, ABC):
    """Base of the stages.

    Args:
        init_from: run directory, HF directory or hub id of the model to start from.
        tokenizer: directory or hub id; by default the one saved with the model.
        chat_template: file of a Jinja template, or the name of one of the tokenizer's; saved with
            the run, so that all that follows uses it. By default the tokenizer's own, or ours.
        optimizer: AdamW or Muon, and their rates.
        schedule: warm-up and decay of the learning rate.
        lora: train a low-rank adapter instead of all weights.
        activation_checkpointing: compute activations twice instead of storing them.
        compile_layers: compile the model's layers with torch.compile; by default where that pays:
            in half precision, in runs of some minutes and more.
        sample_prompts: asked at each validation; the replies are logged as text.
        spike: what to do when the loss jumps.
        sampling: temperature, top-p and lengths for `test`, `predict` and the logged samples.
        rope_scaling: let rotary positions reach beyond the length that the model was trained on.

    Attributes:
        source: the model and tokenizer in use: the ones to start from, or, outside `fit`, those of
            the finished run.
        tokens_seen: tokens of data trained on, by all processes.
        step_totals: sums of the last optimizer step over all processes.
        reads_last_tokens: whether batches hold the last token of each answer, which predicts
            nothing.
        learns_from: the kinds of batches that the stage can learn from.
    """

    reads_last_tokens: ClassVar[bool] = False
    learns_from: ClassVar[tuple[BatchKind, ...]] = ("text", "chat")

    def __init__(
        self,
        init_from: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008  (frozen)
        schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008
        lora: Lora | None = None,
        activation_checkpointing: bool = False,
        compile_layers: bool | None = None,
        sample_prompts: list[str] | None = None,
        spike: Spike = Spike(),  # noqa: B008
        sampling: Sampling = Sampling(),  # noqa: B008
        rope_scaling: RopeScaling | None = None,
    ) -> None:
        super().__init__()
        if compile_layers and activation_checkpointing:
            raise ConfigError(
                "model.compile_layers and model.activation_checkpointing exclude each other."
            )
        self.start = self.model_source(
            partial(ModelSource, init_from, tokenizer, chat_template, rope_scaling)
        )
        self.source = self.start
        self.optimizer_options = optimizer
        self.schedule_options = schedule
        self.lora = lora
        self.activation_checkpointing = activation_checkpointing
        self.compiled = compile_layers  # None: not decided yet
        self.sample_prompts = sample_prompts or []
        self.sampling = sampling
        self.lm: PackedLM | None = None
        self.micro_batches = MicroBatches()
        self.validation_sums = Sums()
        self.loss_watch = LossWatch(spike)
        self.tokens_seen = 0
        self.step_totals: dict[str, float] = {}

    # What a stage is

    @abstractmethod
    def compute_loss(self, batch: PackedBatch) -> LossSums:
        """Return the stage's loss on a batch, as sums.

        Fillers come here, too: batches without targets, which keep processes in step at the end of
        an epoch. For them the count is 0, and the loss is 0 with a graph to all parameters.
        """

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Turn sums into what is logged: means over `count`.

        Args:
            totals: sums over batches and processes, with `loss` and `count`.
        """
        count = max(1.0, totals["count"])
        return {
            name: value / count
            for name, value in totals.items()
            if name not in INTERNAL_SUMS and not name.startswith(SIGNAL)
        }

    def model_source(self, from_options: Callable[..., ModelSource]) -> ModelSource:
        """Return where the stage's model comes from.

        Args:
            from_options: `ModelSource` with the module's options; it takes the other arguments.
        """
        return from_options()

    def check_data(self, data: JSONLDataModule) -> None:
        """Refuse data of a kind that the stage cannot learn from.

        Raises:
            ConfigError: for it.
        """
        if data.batch_kind not in self.learns_from:
            wanted = " or ".join(DATA_OF[kind] for kind in self.learns_from)
            raise ConfigError(
                f"{type(self).__name__} cannot learn from the rows of {type(data).__name__}: use "
                f"{wanted}."
            )

    @property
    def needs_base(self) -> bool:
        """Whether a run cannot go on from a checkpoint without the very model it started from."""
        return self.lora is not None

    # Training: see step.py for what follows the last micro-batch of a step

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the batch's summed loss over a constant; `finish_step` gives the exact scale."""
        sums = self.compute_loss(batch)
        self.micro_batches.sums.add(self._sums_of(sums, batch), self.device)
        self.micro_batches.add(sums.loss, batch)
        return sums.loss / self.loss_divisor

    @property
    def loss_divisor(self) -> float:
        """A constant of the size of a batch's targets, which keeps fp16 gradients in range."""
        return float(self.data.tokens_per_batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale, check and clip the gradients of the step's micro-batches, and log."""
        finish_step(self, optimizer)

    def configure_gradient_clipping(self, *_: object, **__: object) -> None:
        """Nothing: `finish_step` has clipped, with the scale that the gradients then had."""

    def log_step(self, totals: dict[str, float]) -> None:
        """Note an optimizer step's sums, and log their means every `log_every_n_steps`."""
        self.step_totals = totals
        self.tokens_seen += int(totals["tokens"])
        if (self.trainer.global_step + 1) % self.log_every:
            return
        values = {f"train/{name}": value for name, value in self.metrics(totals).items()}
        values["grad_norm"] = totals["norm"]
        values["tokens_seen"] = float(self.tokens_seen)
        values["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict(values, rank_zero_only=True)

    @property
    def model(self) -> PackedLM:
        """The model; built by `configure_model`."""
        assert self.lm is not None
        return self.lm

    @property
    def data(self) -> JSONLDataModule:
        """The DataModule in use."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, JSONLDataModule)
        self.check_data(data)
        return data

    @property
    def log_every(self) -> int:
        """Optimizer steps between two that are logged."""
        return int(self.trainer.log_every_n_steps)  # type: ignore[attr-defined]

    # Validation

    def on_validation_epoch_start(self) -> None:
        """Start the held-out sums anew."""
        self.validation_sums = Sums()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add a held-out batch."""
        self.validation_sums.add(self._sums_of(self.compute_loss(batch), batch), self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out means, each over all targets of all processes."""
        if self.validation_sums.values:
            values = self.metrics(to_floats(self.validation_sums.all_reduced()))
            self.log_dict({f"val/{k}": v for k, v in values.items()}, rank_zero_only=True)

    def _sums_of(self, sums: LossSums, batch: PackedBatch) -> dict[str, Tensor | float]:
        has_targets = sums.count > 0
        of_every_stage: dict[str, Tensor | float] = {
            "loss": sums.loss,
            "count": float(sums.count),
            "tokens": float(batch.n_tokens if has_targets else 0),
            "bytes": self.token_bytes[batch.labels].sum(),
        }
        if reserved := sorted(sums.metrics.keys() & {"loss", *INTERNAL_SUMS}):
            raise ConfigError(
                f"{type(self).__name__}.compute_loss has a metric named {reserved[0]}, which is a "
                "sum of every stage. Give it another name."
            )
        # The metrics of a filler, such as log-probs of a reference, belong to no term.
        metrics = {n: value if has_targets else 0.0 for n, value in sums.metrics.items()}
        return of_every_stage | metrics


def bits_per_byte(totals: dict[str, float]) -> float:
    """Return the loss of all targets in bits per UTF-8 byte of their text."""
    return totals["loss"] / math.log(2) / max(1.0, totals["bytes"])
