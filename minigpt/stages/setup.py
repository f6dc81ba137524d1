"""A stage's model from its source to its checkpoint: built, compiled, optimized, saved."""

from __future__ import annotations

import logging
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minigpt.accel import compile_model, compiling_pays
from minigpt.data import tokenizer as tokenizers
from minigpt.data.datamodule import JSONLDataModule
from minigpt.model.architecture import checkpoint_activations, reproducible_init
from minigpt.model.lora import Lora, add_adapter
from minigpt.model.optimizer import (
    OptimizerOptions,
    ScheduleOptions,
    build_optimizer,
    build_schedule,
)
from minigpt.model.packed_lm import PackedLM
from minigpt.model.parallel import shard
from minigpt.model.restore import check_fit
from minigpt.model.rope import max_positions
from minigpt.model.source import ModelSource
from minigpt.stages.step import LossWatch

log = logging.getLogger(__name__)


class ModelHooks(LightningModule):
    """Hooks that build, compile, optimize and save a stage's model.

    Attributes:
        start: the model and tokenizer that training starts from.
        source: those in use: `start`, or, outside `fit`, the finished run's.
        token_bytes: [V] UTF-8 bytes of each token's text.
    """

    start: ModelSource
    source: ModelSource
    lm: PackedLM | None
    lora: Lora | None
    activation_checkpointing: bool
    compiled: bool | None
    optimizer_options: OptimizerOptions
    schedule_options: ScheduleOptions
    loss_watch: LossWatch
    tokens_seen: int
    token_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._adapter: list[PeftModel] = []  # in a list, so that it is no submodule

    @property
    @abstractmethod
    def model(self) -> PackedLM:
        """The model."""

    @property
    @abstractmethod
    def data(self) -> JSONLDataModule:
        """The DataModule in use."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that travels with the model."""
        return self.source.tokenizer

    @property
    def adapter(self) -> PeftModel | None:
        """The model as peft wraps it, where an adapter is trained."""
        return self._adapter[0] if self._adapter else None

    def use_run(self, run_dir: Path) -> None:
        """Use a finished run's model instead of the one to start from."""
        self.source = ModelSource(str(run_dir), chat=self.start.chat, scores=self.start.scores)

    def configure_model(self) -> None:
        """Build the model once; Lightning may call this several times."""
        if self.lm is not None:
            return
        seed = self.trainer.strategy.broadcast(torch.initial_seed())
        with reproducible_init(seed):
            self.lm = self.build_model().train()
            if self.lora is not None and self.source is self.start:
                self._adapter.append(add_adapter(self.lm.hf, self.lora, self.source.name))
                self.strict_loading = False  # checkpoints hold the adapter only
            sizes = torch.tensor(tokenizers.token_bytes(self.tokenizer))
            self.register_buffer("token_bytes", sizes, persistent=False)  # int64: is never cast
        if self.activation_checkpointing:
            checkpoint_activations(self.lm.hf)
        # Generation takes unsharded weights.
        if self.device_mesh is not None and self.trainer.state.fn in ("fit", "validate"):
            shard(self.lm, self.device_mesh)

    def build_model(self) -> PackedLM:
        """Return the model before training, without this run's adapter."""
        return PackedLM(self.source.build())

    def packed_models(self) -> list[PackedLM]:
        """Return the models that compute packed batches."""
        return [self.model]

    def on_fit_start(self) -> None:
        """Compile the layers, where asked to or where it pays."""
        if self.compiled is None:
            batches = self.total_steps() * self.trainer.accumulate_grad_batches
            recomputes = self.activation_checkpointing  # which would break compiled layers apart
            self.compiled = not recomputes and compiling_pays(self.trainer, self.model, batches)
        if self.compiled:
            log.info("Compiling the model's layers, which takes up to a minute.")
            precision = self.trainer.precision_plugin.forward_context
            tokens, shares_prompts = self.data.tokens_per_batch, self.data.shares_prompts
            for lm in self.packed_models():
                positions = max_positions(lm.hf.config)
                compile_model(lm, tokens, positions, precision, shares_prompts)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and a schedule that is stepped once per optimizer step."""
        optimizer = build_optimizer(self.model, self.optimizer_options)
        schedule = build_schedule(optimizer, self.schedule_options, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Return the run's optimizer steps, from max_steps or max_epochs, whichever is less."""
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            accumulate = trainer.accumulate_grad_batches
            limits.append(self.data.optimizer_steps(trainer.max_epochs, accumulate))
        return max(1, min(limits, default=1))

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokens seen and the loss watch; save only the adapter where one is trained."""
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["loss_watch"] = self.loss_watch.state_dict()
        if self.adapter is not None:
            trainable = {name for name, p in self.named_parameters() if p.requires_grad}
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: w for n, w in weights.items() if n in trainable}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the weights fit; continue the count of tokens and the loss watch.

        Raises:
            ModelError: when they belong to another model.
        """
        if weights := checkpoint.get("state_dict"):  # FSDP2 has loaded its own already
            saved = {name: weight.shape for name, weight in weights.items()}
            current = {name: weight.shape for name, weight in self.state_dict().items()}
            check_fit(self.trainer.ckpt_path, saved, current, self.strict_loading)
        self.tokens_seen = checkpoint["tokens_seen"]
        self.loss_watch.load_state_dict(checkpoint["loss_watch"])
