"""Checkpoints: complete or absent, verified before they are used; the newest ones stay.

A checkpoint is a directory `checkpoints/step=N` with `state.pt` (or the shards of FSDP2) and
a manifest of sizes and checksums. It is filled under another name and renamed when all of it
is on the disk. Then the model is written into it in the same way, as `hf/`.
"""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from minigpt.errors import ConfigError, ModelError
from minigpt.files import (
    atomic_directory,
    clear_leftovers,
    damage,
    explain_unwritable,
    remove_directory,
    write_json,
    write_manifest,
)
from minigpt.model.lora import MODEL_FILES, save_adapter
from minigpt.model.parallel import gather_weights
from minigpt.model.pretrained import save_model
from minigpt.model.restore import (
    BEST_FILE,
    CHECKPOINTS_DIR,
    MODEL_DIR,
    SHARDED,
    STEP_NAME,
    check_sharding,
    load_plain,
    newest_first,
    step_of,
)
from minigpt.stages.base import BaseModule

log = logging.getLogger(__name__)

STATE = "state.pt"
# Which value of a metric is the best, by the last word of its name.
DIRECTIONS = {"loss": "min", "bits_per_byte": "min", "accuracy": "max", "margin": "max"}
ASIDE = "aside-"  # prefix of checkpoints that the run goes on without, see `set_aside`


class AtomicCheckpointIO(CheckpointIO):
    """Writes and reads one process's checkpoint directories."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            TrainingError: when it cannot be written; earlier checkpoints are untouched.
        """
        with explain_unwritable(path), atomic_directory(Path(path)) as partial:
            with (partial / STATE).open("wb") as file:
                torch.save(checkpoint, file)
            write_manifest(partial)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, which the command line has verified; no code in it is ever run.

        Raises:
            ModelError: when it holds more than plain values and tensors, or is one of FSDP2.
        """
        check_sharding(Path(path), sharded=False)
        return load_plain(Path(path) / STATE, map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        remove_directory(Path(path))


@dataclass(frozen=True)
class CheckpointOptions:
    """When checkpoints are saved, and which of them stay.

    Args:
        every: optimizer steps between two.
        keep: how many of the newest are kept, or `all`.
        best: a metric of the validation, such as val/loss. A validation that improves it saves a
            checkpoint, which stays until a better one.
        mode: whether the least or the greatest value is the best. By default the least of metrics
            whose last word is loss or bits_per_byte, the greatest of accuracy and margin.
        export: whether `hf/` holds the last weights or those of the best checkpoint.
    """

    every: int = 500
    keep: int | Literal["all"] = 2
    best: str | None = None
    mode: Literal["min", "max"] | None = None
    export: Literal["last", "best"] = "last"

    def __post_init__(self) -> None:
        if self.best is None and (self.export == "best" or self.mode is not None):
            option = "export: best" if self.export == "best" else f"mode: {self.mode}"
            raise ConfigError(
                f"checkpoint.{option} needs a metric that decides which checkpoint is the best: "
                "set checkpoint.best, for example to val/loss."
            )
        word = (self.best or "").rpartition("/")[2]
        if self.best is not None and self.mode is None and word not in DIRECTIONS:
            raise ConfigError(
                f"checkpoint.best: {self.best} may be best when it is small, or when it is great. "
                "Set checkpoint.mode to min or max."
            )

    @property
    def direction(self) -> int:
        """1 where a greater value of the metric is better, -1 where a smaller one is."""
        mode = self.mode or DIRECTIONS[(self.best or "").rpartition("/")[2]]
        return 1 if mode == "max" else -1


@dataclass(frozen=True)
class Best:
    """The best checkpoint of a run so far.

    Attributes:
        metric: by which it is the best.
        step: optimizer steps after which it was saved.
        held_out: all metrics of the validation of its weights.
    """

    metric: str
    step: int
    held_out: dict[str, float]


class Checkpoints(Checkpoint):
    """Saves a checkpoint, with its model, every so many optimizer steps and at the end.

    Args:
        run_dir: they go to its `checkpoints/`.
        options: how often, and which of them stay.

    Attributes:
        best: the best one so far, where the options name a metric.
    """

    def __init__(self, run_dir: Path, options: CheckpointOptions) -> None:
        self.run_dir = run_dir
        self.directory = run_dir / CHECKPOINTS_DIR
        self.options = options
        self.saved_step: int | None = None  # until training begins
        self.best: Best | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to keep the best of a run that validates nothing.

        Raises:
            ConfigError: for it.
        """
        assert isinstance(pl_module, BaseModule)
        validates = trainer.enable_validation and pl_module.data.held_out_tokens() > 0
        if self.options.best is not None and not validates:
            raise ConfigError(
                f"checkpoint.best: {self.options.best} is measured on held-out data, and the run "
                "has none. Set data.val or data.val_share, or leave checkpoint.best out."
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add which checkpoint is the best."""
        checkpoint["best"] = None if self.best is None else asdict(self.best)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore which checkpoint is the best; checkpoints of earlier versions name none."""
        best = checkpoint.get("best")
        self.best = None if best is None else Best(**best)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what is saved already; clear what was cut off."""
        assert isinstance(pl_module, BaseModule)
        self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, module: BaseModule) -> None:
        """Begin once: a validation that is due when a run goes on comes before `on_train_start`."""
        if self.saved_step is not None:
            return
        self.saved_step = trainer.global_step
        self.last_step = module.total_steps()
        if trainer.is_global_zero:
            clear_leftovers(self.run_dir)
            clear_leftovers(self.directory)
            set_aside(self.run_dir, trainer.global_step)
        self._add_model(trainer, module)
        if trainer.is_global_zero:
            self._check_best()
        self.best = trainer.strategy.broadcast(self.best)

    def _add_model(self, trainer: Trainer, module: BaseModule) -> None:
        """Write the model into the checkpoint of this step, if there is one without it."""
        checkpoint = self.directory / f"step={trainer.global_step}"
        lacks_model = checkpoint.is_dir() and not (checkpoint / MODEL_DIR).is_dir()
        if trainer.strategy.broadcast(lacks_model):
            with explain_unwritable(checkpoint):
                write_model(module, checkpoint / MODEL_DIR)

    def _check_best(self) -> None:
        """Forget the best checkpoint if the options name another metric, or if it is gone."""
        if self.best is not None and self.best.metric != self.options.best:
            self.best = None
        if self.best is not None and not (self._path(self.best) / MODEL_DIR).is_dir():
            log.warning(
                "%s, the best checkpoint by %s, is gone: the best from here on is kept.",
                self._path(self.best),
                self.best.metric,
            )
            self.best = None
        self._note_best()

    def _path(self, best: Best) -> Path:
        return self.directory / f"step={best.step}"

    def _note_best(self) -> None:
        """Write which checkpoint is the best, for those who name it by `best`."""
        file = self.directory / BEST_FILE
        if self.best is not None:
            with explain_unwritable(file):
                write_json(file, asdict(self.best))
        elif file.is_file():
            file.unlink()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save every so many optimizer steps, and after the last one."""
        if trainer.global_step % self.options.every == 0 or trainer.global_step >= self.last_step:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint if its metric is the best so far.

        Raises:
            ConfigError: when the validation does not measure the metric.
        """
        if self.options.best is None:
            return
        assert isinstance(pl_module, BaseModule)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        held_out = {name: value for name, value in metrics.items() if name.startswith("val/")}
        held_out = trainer.strategy.broadcast(held_out)  # the first process alone logs them
        if self.options.best not in held_out:
            raise ConfigError(
                f"checkpoint.best: the validation measures no {self.options.best}, but "
                f"{', '.join(sorted(held_out))}. Name one of them."
            )
        if trainer.sanity_checking:
            return
        self._begin(trainer, pl_module)
        if not self._improves(held_out[self.options.best]):
            return
        self.best = Best(self.options.best, trainer.global_step, held_out)
        if not trainer.strategy.broadcast(self._path(self.best).is_dir()):
            # The step counts as saved, but in the directory of the run that this one goes on from.
            self.saved_step = -1
        self.save(trainer)
        if trainer.is_global_zero:
            self._note_best()
            self._remove_surplus()

    def _improves(self, value: float) -> bool:
        if self.best is None or not math.isfinite(value):
            return math.isfinite(value)
        return self.options.direction * (value - self.best.held_out[self.best.metric]) > 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step of a run that ends before its time."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is saved already; remove what is not to be kept."""
        if trainer.global_step == self.saved_step:
            return
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.directory / f"step={trainer.global_step}")
        module = trainer.lightning_module
        assert isinstance(module, BaseModule)
        self._add_model(trainer, module)
        if trainer.is_global_zero:
            self._remove_surplus()
            for path in self.directory.glob(f"{ASIDE}*"):
                remove_directory(path)

    def _remove_surplus(self) -> None:
        if self.options.keep == "all":
            return
        for path in list(newest_first(self.run_dir))[self.options.keep :]:
            if self.best is None or path != self._path(self.best):
                remove_directory(path)

    def export(self, module: BaseModule) -> int:
        """Write the run's `hf/`: the last weights, or those of the best checkpoint.

        All processes must call this. Returns the optimizer steps that made those weights.
        """
        target, trainer = self.run_dir / MODEL_DIR, module.trainer
        if self.options.export == "last" or self.best is None:
            write_model(module, target)
            return int(trainer.global_step)
        if trainer.is_global_zero:
            with atomic_directory(target, MODEL_FILES) as partial:
                shutil.copytree(self._path(self.best) / MODEL_DIR, partial, dirs_exist_ok=True)
        return self.best.step


def write_model(module: BaseModule, directory: Path) -> None:
    """Write the model (or its adapter) as a directory that the next stage starts from.

    All processes must call this; the first one writes.
    """
    weights = gather_weights(module.trainer.strategy, module.model)
    if not module.trainer.is_global_zero:
        return
    if module.adapter is not None:
        save_adapter(module.adapter, module.tokenizer, directory, weights)
    else:
        save_model(module.model.hf, module.tokenizer, directory, weights)


def set_aside(run_dir: Path, step: int) -> None:
    """Rename the checkpoints after a step, and damaged ones: the run goes on without them.

    They no longer count, so neither `auto` nor `keep` takes them for the run's own. They are
    removed with the first checkpoint that is saved after them.
    """
    aside = [path for path in newest_first(run_dir) if step_of(path) > step or is_damaged(path)]
    for path in aside:
        target = path.with_name(ASIDE + path.name)
        remove_directory(target)
        path.rename(target)
    if aside:
        log.warning(
            "The run goes on after step %d, without %s: kept as %s* until the next checkpoint.",
            step,
            ", ".join(path.name for path in aside),
            run_dir / CHECKPOINTS_DIR / ASIDE,
        )


def is_damaged(path: Path) -> bool:
    """Whether a checkpoint is certainly not whole."""
    try:
        return damage(path) is not None
    except ModelError:  # it cannot be read
        return False


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest undamaged checkpoint; damaged ones are named in a warning.

    Raises:
        ModelError: when a newer one cannot be read, but may be whole.
    """
    for path in sorted((run_dir / CHECKPOINTS_DIR).glob("step=*")):
        if not STEP_NAME.fullmatch(path.name):
            log.warning("%s is left alone: no checkpoint has such a name.", path)
    for path in newest_first(run_dir):
        if (problem := damage(path)) is None:
            return path
        log.warning("The checkpoint %s is damaged (%s): the one before is used.", path, problem)
    return None


def saved_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state (of FSDP2 all but the shards); weights are read when used.

    Raises:
        ModelError: when it holds more than plain values and tensors.
    """
    sharded = path / SHARDED
    return load_plain(sharded if sharded.exists() else path / STATE, mmap=True)


def verify(path: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        ModelError: when something is missing or changed.
    """
    if not path.exists():
        raise ModelError(f"There is no checkpoint at {path}.")
    if problem := damage(path):
        raise ModelError(
            f"The checkpoint {path} is damaged: {problem}. Use another one, or --ckpt_path auto "
            "for the newest that is whole."
        )
