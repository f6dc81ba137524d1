"""Stopping in good order: finish the step, save, leave."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from minigpt.errors import Stopped
from minigpt.runs.checkpoints import Checkpoints
from minigpt.runs.status import SIGNALS, RunStatus, stopped
from minigpt.stages.base import BaseModule
from minigpt.stages.step import SIGNAL

log = logging.getLogger(__name__)


class Stopping(Callback):
    """Answers SIGTERM, SIGINT, SIGHUP (unless `nohup` has it ignored) and SLURM's SIGUSR1.

    Before training they end the process at once, for nothing would be lost. During training
    all processes learn from the sums of each optimizer step whether one of them was asked to
    stop; then all save together and leave. A second Ctrl-C does not wait.

    Args:
        checkpoints: saves.
        status: written before SLURM is asked to run the job again, which ends this one.
    """

    def __init__(self, checkpoints: Checkpoints, status: RunStatus) -> None:
        self.checkpoints = checkpoints
        self.status = status
        self.received = 0  # number of the signal; 0: none
        self.step = -1  # of the last check
        self.training = False
        unwanted = {signal.SIGUSR1} if "SLURM_JOB_ID" not in os.environ else set()
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            unwanted.add(signal.SIGHUP)
        self.signals = SIGNALS.keys() - unwanted

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers, which broadcast while other ranks may not listen."""
        self.training = True
        self.step = trainer.global_step
        self.install()

    def install(self) -> None:
        """Take over the signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self.signals:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        is_second_interrupt = number == self.received == signal.SIGINT
        if not self.training or is_second_interrupt:
            raise self._record_stop(number, None)
        self.received = number
        log.warning("%s: stopping after this step.", signal.Signals(number).name)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let the step's sums over the processes count those that received a signal."""
        assert isinstance(pl_module, BaseModule)
        if trainer.world_size > 1:
            counts = {f"{SIGNAL}{number}": float(self.received == number) for number in SIGNALS}
            pl_module.micro_batches.sums.add({**counts}, pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """After an optimizer step, when all of it is logged, stop if any process is to stop."""
        assert isinstance(pl_module, BaseModule)
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        received = self.received
        if trainer.world_size > 1:
            totals = pl_module.step_totals
            received = next((n for n in SIGNALS if totals[f"{SIGNAL}{n}"]), 0)
        self._save_and_stop(trainer, received)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: object
    ) -> None:
        """Do not wait for a long validation."""
        if not self.training:
            return
        received = self.received
        if trainer.world_size > 1:
            highest = torch.tensor(received, device=pl_module.device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            received = int(highest)
        self._save_and_stop(trainer, received)

    def _save_and_stop(self, trainer: Trainer, received: int) -> None:
        """Save and raise `Stopped`, if a signal was received (0: none)."""
        if not received:
            return
        self.checkpoints.save(trainer)
        error = self._record_stop(received, trainer.global_step)
        trainer.strategy.barrier()  # the first process is killed soon after another one has left
        raise error

    def _record_stop(self, number: int, step: int | None) -> Stopped:
        """Write the status, and ask SLURM to run the job again; return the error to raise."""
        error = stopped(number, step)
        self.status.end(error)
        if number == signal.SIGUSR1 and self.status.first:
            requeue()
        return error


@contextmanager
def restored_signals() -> Iterator[None]:
    """Restore the handlers of the signals at the end, also after an error."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def requeue() -> None:
    """Ask SLURM to run this job again."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ["SLURM_JOB_ID"]
    if task is not None:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("The job %s could not be requeued: %s", job, error)
