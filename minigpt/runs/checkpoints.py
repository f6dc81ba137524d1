"""Checkpoints: complete or absent, verified before they are used; the newest ones stay.

A checkpoint is a directory `checkpoints/step=N` with `state.pt` (or the shards of FSDP2) and
a manifest of sizes and checksums. It is filled under another name and renamed when all of it
is on the disk.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from minigpt.errors import ModelError
from minigpt.files import (
    atomic_directory,
    clear_leftovers,
    damage,
    explain_unwritable,
    remove_directory,
    write_manifest,
)
from minigpt.model.restore import SHARDED, check_kind, load_plain
from minigpt.stages.base import BaseModule

log = logging.getLogger(__name__)

STATE = "state.pt"
NAME = re.compile(r"step=(0|[1-9][0-9]*)")
ASIDE = "aside-"  # before the name of a checkpoint that the run has left behind


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
        check_kind(Path(path), sharded=False)
        return load_plain(Path(path) / STATE, map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint."""
        remove_directory(Path(path))


class Checkpoints(Checkpoint):
    """Saves a checkpoint every so many optimizer steps and at the end; keeps the newest.

    Args:
        run_dir: they go to its `checkpoints/`.
        every: optimizer steps between two.
        keep: how many are kept.
    """

    def __init__(self, run_dir: Path, every: int, keep: int) -> None:
        self.directory = run_dir / "checkpoints"
        self.every = every
        self.keep = keep
        self.saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save again what the run goes on from; clear what was cut off."""
        assert isinstance(pl_module, BaseModule)
        self.saved_step = trainer.global_step
        self.last_step = pl_module.total_steps()
        if trainer.is_global_zero:
            clear_leftovers(self.directory.parent)
            clear_leftovers(self.directory)
            set_aside(self.directory.parent, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save every so many optimizer steps, and after the last one."""
        if trainer.global_step % self.every == 0 or trainer.global_step >= self.last_step:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step of a run that ends before its time."""
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is saved already; remove what is too old."""
        if trainer.global_step == self.saved_step:
            return
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.directory / f"step={trainer.global_step}")
        if trainer.is_global_zero:
            old = list(newest_first(self.directory.parent))[self.keep :]
            for path in (*old, *self.directory.glob(f"{ASIDE}*")):
                remove_directory(path)


def set_aside(run_dir: Path, step: int) -> None:
    """Rename the checkpoints after a step, and damaged ones: the run goes on without them.

    They no longer count, so neither `auto` nor `keep` takes them for the run's own. They are
    removed with the first checkpoint that is saved after them.
    """
    aside = [path for path in newest_first(run_dir) if number(path) > step or is_damaged(path)]
    for path in aside:
        target = path.with_name(ASIDE + path.name)
        remove_directory(target)
        path.rename(target)
    if aside:
        log.warning(
            "The run goes on after step %d, without %s: kept as %s* until the next checkpoint.",
            step,
            ", ".join(path.name for path in aside),
            run_dir / "checkpoints" / ASIDE,
        )


def number(checkpoint: Path) -> int:
    """Return the optimizer steps that a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("step="))


def is_damaged(path: Path) -> bool:
    """Whether a checkpoint is certainly not whole."""
    try:
        return damage(path) is not None
    except ModelError:  # it cannot be read
        return False


def newest_first(run_dir: Path) -> Iterator[Path]:
    """Yield a run's checkpoints, also damaged ones, the one with the most steps first."""
    directories = (run_dir / "checkpoints").glob("step=*")
    named = [path for path in directories if NAME.fullmatch(path.name)]
    yield from sorted(named, key=number, reverse=True)


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest undamaged checkpoint; damaged ones are named in a warning.

    Raises:
        ModelError: when a newer one cannot be read, but may be whole.
    """
    for path in sorted((run_dir / "checkpoints").glob("step=*")):
        if not NAME.fullmatch(path.name):
            log.warning("%s is left alone: no checkpoint has such a name.", path)
    for path in newest_first(run_dir):
        if (problem := damage(path)) is None:
            return path
        log.warning("The checkpoint %s is damaged (%s): the one before is used.", path, problem)
    return None


def saved_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside shards, without reading weights from the disk.

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
