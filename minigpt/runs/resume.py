"""Going on with a run: the same data, tokenizer and base, the same chance, the same threads."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fit_loop import _FitLoop
from torch import Tensor

from minigpt import accel
from minigpt.errors import ConfigError
from minigpt.files import weights_digest
from minigpt.model.parallel import gathered
from minigpt.model.pretrained import find_model
from minigpt.runs.checkpoints import saved_state
from minigpt.runs.loggers import JSONLLogger, RunTensorBoard

log = logging.getLogger(__name__)

# The state of one does not fit another.
FIXED = {"stage", "method", "architecture", "vocabulary"}
# Options of a stage that are compared by content or in other words, or do not move the weights.
# A spike's policy may change: it is how one goes on after a spike.
APART = {"init_from", "tokenizer", "optimizer", "lora", "reference"}
APART |= {"activation_checkpointing", "compile_layers", "sample_prompts", "sampling", "spike"}


@dataclass
class Boundary:
    """Where an optimizer step left a run; a checkpoint describes this, whenever it is saved.

    Args:
        batches: micro-batches of this process so far.
        validation_due: whether a validation comes before the next batch.
        chance: state of the generators that dropout draws from, CPU first and then GPU.
    """

    batches: int = 0
    validation_due: bool = False
    chance: list[Tensor] = field(default_factory=list)


class SameRun(Callback):
    """Keeps in each checkpoint what made it, and compares before a run goes on from it.

    Args:
        allow_changes: go on with other data, tokenizer, base or options, and only say so.
        options: the stage's, as in the config.
        start: the checkpoint that the run goes on from.
    """

    def __init__(self, allow_changes: bool, options: dict[str, Any], start: str | None) -> None:
        self.allow_changes, self.options, self.start = allow_changes, options, start
        self.known: dict[str, str] = {}
        self.changed: list[str] = []
        self.fresh: list[dict[str, Any]] = []
        self.chance: list[Tensor] = []
        self.resumed = False
        self.step, self.last, self.boundary = -1, 0, Boundary()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, before a model is built and weights are loaded into it.

        Raises:
            ConfigError: when the run is not the one that the checkpoint belongs to.
        """
        self.known = identity(trainer, pl_module, self.options)
        if self.start is not None:
            self._compare(saved_state(Path(self.start)).get("run", {}), self.known)

    def _compare(self, then: dict[str, str], now: dict[str, str]) -> None:
        self.changed = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
        if not self.changed:
            return
        told = "; ".join(f"{k} was {then.get(k)}, is {now.get(k)}" for k in self.changed)
        fixed = FIXED.intersection(self.changed)
        if fixed or not self.allow_changes:
            override = "" if fixed else ", or go on all the same with --allow_changes true"
            raise ConfigError(
                f"This is not the run that the checkpoint belongs to: {told}. Put it back, "
                f"or start a new run{override}."
            )
        log.warning("Going on although this is another run: %s.", told)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the optimizer's options before a checkpoint's are put over them."""
        groups = trainer.optimizers[0].param_groups
        self.fresh = [{k: v for k, v in group.items() if k != "params"} for group in groups]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note where the run stands after an optimizer step."""
        if trainer.global_step != self.step:
            loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
            due = loop._should_check_val_fx(fetcher)  # type: ignore[arg-type]
            ends = trainer.global_step >= self.last and trainer.enable_validation
            self._note(trainer, pl_module, due or ends)

    def _note(self, trainer: Trainer, pl_module: LightningModule, validation_due: bool) -> None:
        self.step = trainer.global_step
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        self.boundary = Boundary(batches, validation_due, chance(pl_module.device))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation after the last step is done."""
        self.boundary.validation_due = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the run's identity and circumstances, and where its last step left it."""
        checkpoint["run"] = self.known
        checkpoint["machine"] = circumstances(trainer, pl_module)
        checkpoint["boundary"] = {
            "batches": self.boundary.batches,
            "validation_due": self.boundary.validation_due,
            "chance": gathered([self.boundary.chance]),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the threads and the state of chance."""
        if trainer.state.fn != "fit":
            return
        machine = checkpoint.get("machine", {})
        if pl_module.compiled is None:
            pl_module.compiled = machine.get("compiled")
        take_up_machine(machine, circumstances(trainer, pl_module))
        then: dict[str, Any] = checkpoint["boundary"]
        chances, rank = then.pop("chance"), trainer.global_rank
        self.boundary = Boundary(**then, chance=chances[rank] if rank < len(chances) else [])
        self.resumed = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take up the run where the checkpoint left it."""
        self.last = pl_module.total_steps()
        if not self.resumed:
            return self._note(trainer, pl_module, False)
        self._take_up_rates(trainer)
        self.step, self.chance = trainer.global_step, self.boundary.chance
        for logger in trainer.loggers:
            if isinstance(logger, JSONLLogger | RunTensorBoard):
                logger.rewind(trainer.global_step, self.boundary.validation_due)
        start_clean(trainer, self.boundary.batches)
        if self.boundary.validation_due:
            validate(trainer)
        return None

    def _take_up_rates(self, trainer: Trainer) -> None:
        """Put changed options in force, and the rate that the run's length gives this step.

        A checkpoint holds the rate of the length that the run had then.
        """
        schedule: Any = trainer.lr_scheduler_configs[0].scheduler
        groups = trainer.optimizers[0].param_groups
        if {"optimizer", "schedule"}.intersection(self.changed):
            schedule.base_lrs = [group["initial_lr"] for group in self.fresh]
            for group, fresh in zip(groups, self.fresh, strict=True):
                group.update(fresh)
        rates = zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, peak, factor in rates:
            group["lr"] = peak * factor(schedule.last_epoch)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take up the state of chance with the first batch."""
        if self.chance:
            torch.set_rng_state(self.chance[0])
            if pl_module.device.type == "cuda" and len(self.chance) > 1:
                torch.cuda.set_rng_state(self.chance[1], pl_module.device)
            self.chance = []


class FitLoop(_FitLoop):
    """Lightning's, but a run that was cut off after its last step still gets its end."""

    @classmethod
    def put_in(cls, trainer: Trainer) -> None:
        """Let a trainer use this loop."""
        old = trainer.fit_loop
        trainer.fit_loop = cls(trainer, old.min_epochs, old.max_epochs)
        trainer.fit_loop.epoch_loop = old.epoch_loop

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do, not even the export at the end."""
        return bool(self.trainer.limit_train_batches == 0)


def start_clean(trainer: Any, batches: int) -> None:
    """Let Lightning begin an epoch at the DataModule's position, with nothing half done.

    Its own way of going on guesses from counters what was under way, and takes the end of an
    epoch of unknown length for its middle. A checkpoint describes the end of an optimizer step,
    so there is nothing to guess.
    """
    fit = trainer.fit_loop
    for loop in (fit, fit.epoch_loop, fit.epoch_loop.val_loop):
        loop._restarting = False
        loop.reset_restart_stage()
    fit.epoch_loop._batches_that_stepped = trainer.global_step
    epoch, _ = trainer.datamodule.position
    counts = [(fit.epoch_loop.batch_progress.total, batches)]
    counts += [(fit.epoch_progress.total, epoch), (fit.epoch_progress.current, epoch)]
    for count, done in counts:
        count.ready = count.started = count.processed = count.completed = done


def validate(trainer: Any) -> None:
    """Validate the weights after the last optimizer step; logged as that step's."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped -= 1
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    loop._batches_that_stepped += 1


def chance(device: torch.device) -> list[Tensor]:
    """Return the state of this process's generators."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def take_up_machine(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Use as many threads as before, and say what else is different."""
    if then.get("threads", now["threads"]) != now["threads"]:
        torch.set_num_threads(then["threads"])  # sums depend on how many threads share them
        log.info("Threads: %d, as before.", then["threads"])
    for name in ("processes", "precision", "torch", "compiled", "attention"):
        if then.get(name, now[name]) != now[name]:
            log.warning(
                "%s: %s before, %s now. The order of data is the same; numbers agree up to "
                "rounding.",
                *(name, then[name], now[name]),
            )


def identity(trainer: Any, pl_module: Any, options: dict[str, Any]) -> dict[str, str]:
    """Return what makes a run this run, as short texts that can be compared and read."""
    data = trainer.datamodule
    rates = asdict(pl_module.optimizer_options)
    own = {name: value for name, value in options.items() if name not in APART}
    if "architecture" in own:
        own["architecture"] = dict(own["architecture"])
        own["dropout"] = own["architecture"].pop("dropout")  # fits any weights
    known = {
        "stage": type(pl_module).__name__,
        "method": f"{rates.pop('name')}, {pl_module.lora or 'all weights'}",
        "optimizer": listed(rates),
        "tokenizer": tokenizer_digest(pl_module.tokenizer),
        "vocabulary": str(len(pl_module.tokenizer)),
        "data": data.fingerprint(),
        "seed": str(data.seed),
        "tokens_per_batch": str(data.tokens_per_batch),
        "batches_per_step": str(trainer.accumulate_grad_batches * trainer.world_size),
        "gradient_clip_val": clipping(trainer),
        **{name: listed(value) for name, value in own.items()},
        **epoch_limits(trainer),
    }
    if pl_module.needs_base:
        known["base"] = model_digest(pl_module.init_from)
    return known


def epoch_limits(trainer: Trainer) -> dict[str, str]:
    """Return what makes an epoch shorter than the data."""
    names = {"limit_train_batches": 1.0, "overfit_batches": 0.0}
    values = {name: getattr(trainer, name) for name in names}
    return {name: str(value) for name, value in values.items() if value != names[name]}


def clipping(trainer: Trainer) -> str:
    """Return how gradients are clipped."""
    by = " by value" if trainer.gradient_clip_algorithm == "value" else ""
    return f"{trainer.gradient_clip_val}{by}"


def listed(value: Any) -> str:
    """Return an option as a short text."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return str(value)


def circumstances(trainer: Trainer, pl_module: Any) -> dict[str, Any]:
    """Return what may change the last bits of a sum."""
    half = str(trainer.precision).startswith("bf16") and pl_module.device.type == "cpu"
    return {
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "torch": str(torch.__version__),
        "compiled": pl_module.compiled,
        "attention": accel.attention_name(half),
    }


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of a tokenizer's vocabulary and template."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def model_digest(place: str) -> str:
    """Return a digest of a model's weight files; of its name, for one on a hub."""
    found = find_model(place)
    return weights_digest(found) if isinstance(found, Path) else found
