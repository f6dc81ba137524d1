"""The only module that touches what Lightning keeps private, tested with lightning 2.6.

| what | private part | why |
|---|---|---|
| `VerbCLI` | `LightningCLI._parse_ckpt_path` | puts a checkpoint's old values over the config and the command line (Lightning #20801) |
| `VerbCLI` | `LightningCLI._run_subcommand` | the only place between building the Trainer and preparing data, before which signals must be handled |
| `FitLoop` | `_FitLoop.skip` | a run that was cut off after its last step gets no end, and no export (#19617) |
| `RestoringConnector` | `Trainer._checkpoint_connector`, `_restore_modules_and_callbacks` | what a checkpoint holds is taken unchecked, and odd values raise anything |
| `restart_at` | `_restarting`, `_batches_that_stepped` | resuming guesses from counters what was under way, takes the end of an epoch of unknown length for its middle, and validates at wrong times (#19549, #20277) |
| `validate_now` | `_batches_that_stepped` | logs a validation outside the loop one step too late |
| `validation_follows` | `_should_check_val_fx`, `_data_fetcher` | whether a validation comes before the next batch: a checkpoint must hold it |
| `observe_children` | `_launch_process_observer`, `_ChildProcessObserver` | when a process dies, the first one is killed without a word and with exit status 0 (#17248) |
| `purge_after` | `TensorBoardLogger._kwargs` | a resumed run draws over what was logged after the checkpoint (#12991) |
| `AllProcessesStrategy` | `_data_parallel_size` | "auto" is the number of machines, not of processes |

`tests/unit/test_lightning_internals.py` fails when an upgrade moves one of them.
"""  # noqa: E501  (a table)

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import subprocess_script as launcher
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector


class VerbCLI(LightningCLI):
    """LightningCLI whose config wins over a checkpoint's, with a hook before the verb runs."""

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it is."""

    def _run_subcommand(self, subcommand: str) -> None:
        self.before_verb()
        super()._run_subcommand(subcommand)

    def before_verb(self) -> None:
        """Called when all is built and nothing has begun."""


class FitLoop(_FitLoop):
    """Lightning's loop, which also ends a run that was cut off after its last step."""

    @classmethod
    def install(cls, trainer: Trainer) -> None:
        """Let a trainer use this loop."""
        old = trainer.fit_loop
        trainer.fit_loop = cls(trainer, old.min_epochs, old.max_epochs)
        trainer.fit_loop.epoch_loop = old.epoch_loop

    @property
    def skip(self) -> bool:
        """Whether there is nothing to do, not even the export at the end."""
        return bool(self.trainer.limit_train_batches == 0)


class RestoringConnector(_CheckpointConnector):
    """Lightning's connector, which restores a checkpoint inside a guard.

    Args:
        trainer: whose connector this is.
        guard: returns the context for the checkpoint's path.
    """

    def __init__(
        self, trainer: Trainer, guard: Callable[[Path], AbstractContextManager[None]]
    ) -> None:
        super().__init__(trainer)
        self._guard = guard

    def _guarded(self, path: str | Path | None) -> AbstractContextManager[None]:
        return nullcontext() if path is None else self._guard(Path(path))

    def _restore_modules_and_callbacks(
        self, checkpoint_path: str | Path | None = None, weights_only: bool | None = None
    ) -> None:
        with self._guarded(checkpoint_path):
            super()._restore_modules_and_callbacks(checkpoint_path, weights_only)

    def restore_training_state(self) -> None:
        """Restore loops, optimizers and schedules."""
        with self._guarded(self.trainer.ckpt_path):
            super().restore_training_state()


def batches_started(trainer: Trainer) -> int:
    """Return how many micro-batches this process has begun."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def restart_at(trainer: Trainer, epoch: int, batches: int) -> None:
    """Begin an epoch's loop at a position of the data, with nothing half done.

    Args:
        trainer: whose counters a checkpoint has restored.
        epoch: how many epochs are complete.
        batches: micro-batches of this process so far.
    """
    fit = trainer.fit_loop
    for loop in (fit, fit.epoch_loop, fit.epoch_loop.val_loop):
        loop._restarting = False
        loop.reset_restart_stage()
    fit.epoch_loop._batches_that_stepped = trainer.global_step
    counts = [(fit.epoch_loop.batch_progress.total, batches)]
    counts += [(fit.epoch_progress.total, epoch), (fit.epoch_progress.current, epoch)]
    for count, done in counts:
        for name in ("ready", "started", "processed", "completed"):
            setattr(count, name, done)


def validate_now(trainer: Trainer) -> None:
    """Validate the weights after the last optimizer step; logged as that step's."""
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped -= 1
    trainer.validating = True
    loop.val_loop.run()
    trainer.training = True
    loop._batches_that_stepped += 1


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates before the next micro-batch."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def purge_after(logger: TensorBoardLogger, steps: int) -> None:
    """Let TensorBoard hide what was logged after a number of optimizer steps."""
    logger._kwargs["purge_step"] = steps


class _Observer(_ChildProcessObserver):
    """Ends this process's children, and this process, when one of them has died."""

    def __init__(
        self, children: list[subprocess.Popen[bytes]], exit_code_after_death: Callable[[], int]
    ) -> None:
        super().__init__(os.getpid(), children)
        self._exit_code_after_death = exit_code_after_death

    def _terminate_all(self) -> None:
        exit_code = self._exit_code_after_death()
        for process in self._child_processes:
            process.kill()
        os._exit(exit_code)


def observe_children(exit_code_after_death: Callable[[], int], until: ExitStack) -> None:
    """Observe the processes that Lightning's launcher starts.

    Args:
        exit_code_after_death: called in a thread when a process has died, before the others are
            killed; returns the exit status of this process.
        until: when it closes, Lightning's own observer is put back.
    """
    name = "_launch_process_observer"
    until.callback(setattr, launcher, name, getattr(launcher, name))
    setattr(launcher, name, lambda children: _Observer(children, exit_code_after_death).start())


class AllProcessesStrategy(ModelParallelStrategy):
    """FSDP2 whose shards are spread over all processes of all machines."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1)

    def setup_environment(self) -> None:
        """Count the processes, then join them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
