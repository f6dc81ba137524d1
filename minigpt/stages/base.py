"""What all stages share: building the model, optimizer, exact loss scaling, logging.

A stage adds its `step`: from a packed batch to a summed loss, what it was summed over,
and the sums behind its metrics.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from minigpt.accel import compile_model, compiling_pays
from minigpt.data import tokenizer as tokenizers
from minigpt.data.batch import PackedBatch
from minigpt.data.chat import install_template
from minigpt.data.formats import Prompt
from minigpt.errors import ConfigError
from minigpt.evaluate.exam import Item, ItemResult, accuracies, load_items, run_eval
from minigpt.infer.engine import Engine, Sampling
from minigpt.model.architecture import (
    check_same_tokens,
    check_vocabulary,
    checkpoint_activations,
    count_parameters,
    embedding_rows,
    fit_vocabulary,
    reproducible_init,
)
from minigpt.model.lora import Lora, add_adapter, save_adapter
from minigpt.model.optimizer import (
    OptimizerOptions,
    ScheduleOptions,
    build_optimizer,
    build_schedule,
    scale_and_clip,
)
from minigpt.model.packed_lm import PackedLM
from minigpt.model.parallel import flat_weights, full_weights, gathered, gradient_norm, shard
from minigpt.model.pretrained import (
    find_model,
    load_config,
    load_model,
    save_model,
    tokenizer_source,
)
from minigpt.model.restore import check_fit
from minigpt.model.rope import RopeScaling, check_length, max_positions, scale, scale_config
from minigpt.stages.guard import LossWatch, Spike, Window, may_step, unscale
from minigpt.stages.totals import Totals, read

log = logging.getLogger(__name__)


@dataclass
class Step:
    """What a stage makes of one micro-batch.

    Attributes:
        loss: sum of the losses; its gradient trains the model.
        count: how many terms it sums: targets, or pairs.
        sums: further sums; logged divided by `count`.
    """

    loss: Tensor
    count: int
    sums: dict[str, Tensor | float] = field(default_factory=dict)


class BaseModule(LightningModule, ABC):
    """Base of the stages.

    Args:
        init_from: run directory, HF directory or hub id of the model to start from.
        tokenizer: directory or hub id; by default the one saved with the model.
        chat_template: file of a Jinja template, or the name of one of the tokenizer's; saved with
            the run, so that all that follows uses it. By default the tokenizer's own, or ours.
        optimizer: which optimizer, and its rates.
        schedule: how the learning rate moves.
        lora: train a low-rank adapter instead of the whole model.
        activation_checkpointing: compute activations twice instead of keeping them.
        compile_layers: compile the model's layers with torch.compile; by default where that pays:
            in half precision, in runs of some minutes and more.
        sample_prompts: asked at each validation; the replies are logged as text.
        spike: what to do when the loss jumps.
        sampling: how `test`, `predict` and the logged samples choose tokens.
        rope_scaling: let rotary positions reach beyond the length that the model was trained on.
    """

    needs_chat = True  # asks and answers in the chat template
    needs_start = True  # goes on from a model
    keeps_base = False  # the model it starts from takes part to the end
    flag = "flag/"  # before the names of sums that tell processes of each other, and no metric

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
        if self.needs_start and init_from is None:
            raise ConfigError(
                "Set model.init_args.init_from to the model to start from, such as "
                "outputs/pretrain."
            )
        if compile_layers and activation_checkpointing:
            raise ConfigError(
                "model.compile_layers and model.activation_checkpointing exclude each other."
            )
        self.init_from, self.tokenizer_path = init_from, tokenizer
        self.chat_template = chat_template
        self.optimizer_options, self.schedule_options = optimizer, schedule
        self.lora, self.activation_checkpointing = lora, activation_checkpointing
        self.compiled = compile_layers  # None: not decided yet
        self.sample_prompts, self.sampling = sample_prompts or [], sampling
        self.rope_scaling = rope_scaling
        self.trained: str | None = None  # a finished run to use instead of `init_from`
        self.lm: PackedLM | None = None
        self.peft: list[Any] = []  # the adapter's handle; in a list so it is no submodule
        self.window, self.held_out = Totals(), Totals()
        self.parts, self.watch = Window(), LossWatch(spike)
        self.tokens_seen = 0  # by all processes
        self.step_totals: dict[str, float] = {}  # of the last step, over all processes

    @abstractmethod
    def step(self, batch: PackedBatch) -> Step:
        """Return the stage's loss on a batch, as sums."""

    @property
    def needs_base(self) -> bool:
        """Whether a run cannot go on from a checkpoint without the very model it started from."""
        return self.keeps_base or self.lora is not None

    # Building

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that travels with the model, with a chat template where needed."""
        chosen = None if self.trained else self.chat_template  # what was trained has it already
        tokenizer = tokenizers.load(self._tokenizer_place(), chosen)
        if self.tokenizer_path and self.init_from and not self.trained:
            check_same_tokens(tokenizer, find_model(self.init_from))
        self.vocabulary = tokenizers.id_count(tokenizer)
        if self.needs_chat:
            install_template(tokenizer)
        return tokenizer

    def _tokenizer_place(self) -> str | Path:
        return (self.trained is None and self.tokenizer_path) or tokenizer_source(self.start)

    @property
    def start(self) -> str:
        """Where the weights and the tokenizer come from."""
        start = self.trained or self.init_from
        assert start is not None
        return start

    def build(self) -> PreTrainedModel:
        """Return the model before training."""
        model = load_model(self.start)
        tokenizer = self.tokenizer
        check_vocabulary(embedding_rows(model), tokenizer)
        if self._adds_tokens():
            fit_vocabulary(model, tokenizer)
        return self.scaled(model)

    def _adds_tokens(self) -> bool:
        """Whether the chat template brought tokens that the tokenizer did not have."""
        return tokenizers.id_count(self.tokenizer) > self.vocabulary

    def rows(self) -> int:
        """Return how many token ids the model embeds when training begins.

        Raises:
            ModelError: when the tokenizer is another model's.
        """
        rows = int(self.first_config().get_text_config(decoder=True).vocab_size)
        check_vocabulary(rows, self.tokenizer)
        # A trained adapter brings rows for the tokens that its run added; the config is its base's.
        grown = self._adds_tokens() or (self.trained is not None and self.lora is not None)
        return max(rows, tokenizers.id_count(self.tokenizer)) if grown else rows

    def scaled(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a model with its rotary positions scaled, where that is asked for."""
        if self.rope_scaling is not None and self.trained is None:
            scale(model, self.rope_scaling)
            self.tokenizer.model_max_length = max_positions(model.config)
        return model

    def check_length(self, length: int, kind: str) -> None:
        """Refuse, with a ConfigError, samples that are longer than the model reads.

        Args:
            length: of samples in tokens, at most.
            kind: of the records: text, chat or preference.
        """
        config = self.first_config()
        if self.rope_scaling is not None and self.trained is None:
            scale_config(config, self.rope_scaling)
        check_length(config, length, kind)

    def first_config(self) -> PreTrainedConfig:
        """Return the config of the model that the run starts from."""
        return load_config(self.start)

    def configure_model(self) -> None:
        """Build the model once; Lightning may call this several times."""
        if self.lm is not None:
            return
        with reproducible_init(self.trainer.strategy.broadcast(torch.initial_seed())):
            self.lm = self._build_lm().train()
        trains = self.trainer.state.fn in ("fit", "validate")  # generation takes whole weights
        if self.device_mesh is not None and trains:
            shard(self.lm, self.device_mesh)
        total, trained = count_parameters(self.lm)
        log.info("%s parameters, %s of them trained", f"{total:,}", f"{trained:,}")

    def _build_lm(self) -> PackedLM:
        model = self.build()
        lm = PackedLM(model)
        self.before_adapter(lm)
        if self.lora is not None and self.trained is None:
            self.peft.append(add_adapter(model, self.lora, self._base_name()))
            self.strict_loading = False  # checkpoints hold the adapter only
        if self.activation_checkpointing:
            checkpoint_activations(model)
        sizes = torch.tensor(tokenizers.token_bytes(self.tokenizer))  # int64: no precision casts it
        self.register_buffer("token_bytes", sizes, persistent=False)
        return lm

    def before_adapter(self, lm: PackedLM) -> None:
        """Called with the whole model before an adapter is put on it."""

    def _base_name(self) -> str:
        found = find_model(self.start)
        return str(found.resolve()) if isinstance(found, Path) else found

    @property
    def model(self) -> PackedLM:
        """The model; built by `configure_model`."""
        assert self.lm is not None
        return self.lm

    def on_fit_start(self) -> None:
        """Compile the layers, where asked to or where it pays."""
        if self.compiled is None:
            batches = self.total_steps() * self.trainer.accumulate_grad_batches
            again = self.activation_checkpointing  # which would break compiled layers apart
            self.compiled = not again and compiling_pays(self.trainer, self.model, batches)
        if self.compiled:
            log.info("Compiling the model's layers, which takes up to a minute.")
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            precision = self.trainer.precision_plugin.forward_context
            for lm in self.packed_models():
                positions = max_positions(lm.hf.config)
                pairs = data.kind == "preference"
                compile_model(lm, data.tokens_per_batch, positions, precision, pairs)

    def packed_models(self) -> list[PackedLM]:
        """Return the models that compute packed batches."""
        return [self.model]

    # Optimization

    def configure_optimizers(self) -> Any:
        """Return the optimizer and a schedule that is stepped once per optimizer step."""
        options = self.optimizer_options
        if options.name == "muon" and isinstance(self.trainer.strategy, FSDPStrategy):
            log.warning("FSDP1 flattens matrices, which Muon needs whole: AdamW is used.")
            options = OptimizerOptions(name="adamw", lr=options.adamw_lr)
        optimizer = build_optimizer(self.model, options)
        schedule = build_schedule(optimizer, self.schedule_options, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Return the run's optimizer steps, from max_steps or max_epochs, whichever is less."""
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            epochs, accumulate = trainer.max_epochs, trainer.accumulate_grad_batches
            limits.append(data.optimizer_steps(epochs, accumulate))
        return max(1, min(limits, default=1))

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Return the batch's summed loss over a constant; the exact scale comes later."""
        step = self.step(batch)
        self.window.add(self._sums(step, batch), self.device)
        self.parts.add(step.loss, batch)
        return step.loss / self._nominal

    @property
    def _nominal(self) -> float:
        """A constant of the size of a batch's targets, which keeps fp16 gradients in range."""
        return float(self.trainer.datamodule.tokens_per_batch)  # type: ignore[attr-defined]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Scale the gradients to the mean over all targets of the step, check and clip them.

        Lightning divided each micro-batch by `accumulate_grad_batches` and the processes'
        gradients were averaged. Both are undone here, so that a short last window, uneven
        batches or another number of processes change nothing.

        Raises:
            TrainingError: when the loss or a gradient is not finite, the loss jumps, or fp16
                cannot hold the gradients.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        unscale(scaler, optimizer)
        totals = self.window.reduced()
        averaged = self.trainer.accumulate_grad_batches * self.trainer.world_size
        scale = self._nominal * averaged / totals["count"].clamp(min=1).float()
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = gradient_norm(grads, isinstance(self.trainer.strategy, FSDPStrategy)) * scale
        numbers = read({**totals, "norm": norm})  # the one wait for the device in a step
        number, loss = self.trainer.global_step + 1, numbers["loss"] / max(1.0, numbers["count"])
        if may_step(number, loss, numbers["norm"], self.parts, self.watch, scaler):
            scale_and_clip(grads, scale, norm, gradient_clip_val, gradient_clip_algorithm)
        else:
            optimizer.zero_grad(set_to_none=True)  # without gradients, weights and moments stay
        # Not sooner: a checkpoint always describes the end of an optimizer step.
        self.trainer.datamodule.advance(self.parts.resume_at)  # type: ignore[attr-defined]
        self.tokens_seen += int(numbers["tokens"])
        self.step_totals = numbers
        self._log_step(numbers)
        self.window.clear()
        self.parts.clear()

    # Logging

    def _sums(self, step: Step, batch: PackedBatch) -> dict[str, Tensor | float]:
        return {
            "loss": step.loss,
            "count": float(step.count),
            "tokens": float(batch.n_tokens if step.count else 0),  # a filler teaches nothing
            "bytes": self.token_bytes[batch.labels].sum(),  # type: ignore[index]
            # A filler has no pairs, but its references have log-probs.
            **{name: value if step.count else 0.0 for name, value in step.sums.items()},
        }

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Turn sums into what is logged: means over `count`."""
        count = max(1.0, totals["count"])
        hidden = ("count", "tokens", "bytes", "norm")
        shown = {k: v for k, v in totals.items() if k not in hidden and not k.startswith(self.flag)}
        return {name: value / count for name, value in shown.items()}

    def _log_step(self, totals: dict[str, float]) -> None:
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        values = {f"train/{name}": value for name, value in self.metrics(totals).items()}
        values |= {"grad_norm": totals["norm"], "tokens_seen": float(self.tokens_seen)}
        values["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict(values, rank_zero_only=True)

    # Validation

    def on_validation_epoch_start(self) -> None:
        """Start the held-out sums anew."""
        self.held_out.clear()

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Add a held-out batch."""
        self.held_out.add(self._sums(self.step(batch), batch), self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out means, each over all targets of all processes."""
        if self.held_out.sums:
            values = self.metrics(read(self.held_out.reduced()))
            self.log_dict({f"val/{k}": v for k, v in values.items()}, rank_zero_only=True)

    # Exam and prediction

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.model.hf, self.tokenizer)

    def engine(self) -> Engine:
        """Return an inference engine over the model as it stands."""
        if self.trainer.state.fn == "fit":  # its copy of the weights is not kept
            return Engine(self.model.hf, self.tokenizer)
        return self._engine

    def load_exam(self, path: str) -> list[Item]:
        """Return the items of an exam file, for the DataModule to deal out."""
        return load_items(path, "exam")

    def on_test_epoch_start(self) -> None:
        """Start the exam's sums anew."""
        self.held_out.clear()
        self.exam_results: list[ItemResult] = []

    def test_step(
        self, batch: PackedBatch | list[Item], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Judge the replies to exam items, or add a held-out batch where there is no exam."""
        if isinstance(batch, PackedBatch):
            return self.validation_step(batch, batch_idx)
        self.exam_results += run_eval(self.engine(), batch, self.sampling)
        return None

    def on_test_epoch_end(self) -> None:
        """Log each family's share of right replies, or the held-out means."""
        if self.held_out.sums:
            return self.on_validation_epoch_end()
        self.exam_results = gathered(self.exam_results)
        shares = accuracies(self.exam_results)
        values = {f"exam/{family}": share for family, share in shares.items()}
        self.log_dict(values, rank_zero_only=True)
        return None

    def predict_step(
        self, batch: list[Prompt], batch_idx: int
    ) -> list[tuple[int, dict[str, Any], str]]:
        """Complete prompts; each comes back as its number, its row and the completion."""
        replies = self.engine().complete([p.content for p in batch], self.sampling)
        return [(p.number, p.row, reply.text) for p, reply in zip(batch, replies, strict=True)]

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the count of tokens; of an adapter's run, only the adapter."""
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["loss_watch"] = self.watch.state_dict()
        if self.peft:
            trained = {name for name, p in self.named_parameters() if p.requires_grad}
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {n: w for n, w in weights.items() if n in trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See whether the weights fit; continue the count of tokens and the running mean."""
        if weights := checkpoint.get("state_dict"):  # FSDP2 has loaded its own already
            saved, own = ({n: w.shape for n, w in d.items()} for d in (weights, self.state_dict()))
            check_fit(self.trainer.ckpt_path, saved, own, self.strict_loading)
        self.tokens_seen = checkpoint["tokens_seen"]
        self.watch.load_state_dict(checkpoint["loss_watch"])

    def export(self, directory: Path) -> None:
        """Write the model (or its adapter) as a directory that the next stage starts from."""
        flat = isinstance(self.trainer.strategy, FSDPStrategy)
        weights = flat_weights(self.model, self.trainer) if flat else full_weights(self.model)
        if not self.trainer.is_global_zero:
            return
        if self.peft:
            save_adapter(self.peft[0], self.tokenizer, directory, weights)
        else:
            save_model(self.model.hf, self.tokenizer, directory, weights)


def bits_per_byte(totals: dict[str, float]) -> float:
    """Return the loss of all targets in bits per UTF-8 byte of their text."""
    return totals["loss"] / math.log(2) / max(1.0, totals["bytes"])
