"""Stopping in good order: finish the step, save, leave; and a file that says how a run ended."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import subprocess_script as launcher

from minigpt.errors import (
    INTERRUPTED,
    PREEMPTED,
    ConfigError,
    MiniGPTError,
    ProcessLost,
    RunExistsError,
    Stopped,
    chain,
)
from minigpt.files import unwritable, write_json
from minigpt.runs.checkpoints import Checkpoints

log = logging.getLogger(__name__)

SIGNALS: dict[int, int] = {
    signal.SIGTERM: PREEMPTED,
    signal.SIGINT: INTERRUPTED,
    signal.SIGUSR1: PREEMPTED,
}

LOST = (
    "Another process of this run has died or does not answer; its own output says why. "
    "Go on from the last checkpoint with --ckpt_path auto."
)
PATIENCE = 10  # seconds that the first process has to leave when another has left


class Stopping(Callback):
    """Answers SIGTERM, SIGINT and SLURM's SIGUSR1.

    Before training they end the process at once, for nothing would be lost. During training
    all processes learn from the sums of each optimizer step whether one of them was asked to
    stop; then all save together and leave. A second Ctrl-C does not wait.

    Args:
        checkpoints: saves.
        status: is told before SLURM is asked to run the job again, which ends this one.
    """

    def __init__(self, checkpoints: Checkpoints, status: RunStatus) -> None:
        self.checkpoints, self.status = checkpoints, status
        self.received = 0
        self.step = -1
        self.training = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take them over again: Lightning's handlers broadcast where a rank may not listen."""
        self.training, self.step = True, trainer.global_step
        self.install()

    def install(self) -> None:
        """Take over the signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if number != signal.SIGUSR1 or "SLURM_JOB_ID" in os.environ:
                signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if not self.training or (number == signal.SIGINT == self.received):
            raise self._ended(number, None)
        self.received = number
        log.warning("%s: stopping after this step.", signal.Signals(number).name)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Let the step's sums over the processes count those that were asked to stop."""
        if trainer.world_size > 1:
            flag, received = pl_module.flag, self.received
            asked = {f"{flag}{number}": float(received == number) for number in SIGNALS}
            pl_module.window.add(asked, pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, when all of it is logged, see whether any was asked to stop."""
        if trainer.global_step == self.step:
            return
        self.step, asked = trainer.global_step, self.received
        if trainer.world_size > 1:
            counts = (
                (number, pl_module.step_totals[f"{pl_module.flag}{number}"]) for number in SIGNALS
            )
            asked = next((number for number, count in counts if count), 0)
        self._leave(trainer, asked)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Do not wait for a long validation."""
        if not self.training:
            return
        asked = self.received
        if trainer.world_size > 1:
            flag = torch.tensor(asked, device=pl_module.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = int(flag)
        self._leave(trainer, asked)

    def _leave(self, trainer: Trainer, asked: int) -> None:
        if not asked:
            return
        self.checkpoints.save(trainer)
        error = self._ended(asked, trainer.global_step)
        trainer.strategy.barrier()  # the first process is killed soon after another one has left
        raise error

    def _ended(self, number: int, step: int | None) -> Stopped:
        error = stopped(number, step)
        self.status.end(error)
        if number == signal.SIGUSR1 and self.status.first:
            requeue()
        return error


@contextmanager
def signals_given_back() -> Iterator[None]:
    """Put the handlers of the signals back at the end, however it comes."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make and hold a run directory; the system lets go of it even when the process is killed.

    Raises:
        RunExistsError: when another process trains in it.
        ConfigError: when it cannot be written to.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run_dir).close()
        lock = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"Cannot write to {run_dir}: {error.strerror}. Choose another --run_dir."
        ) from error
    with lock as file:
        try:
            # Not flock, which readers that outlive a killed run would go on to hold.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunExistsError(
                f"Another process is training in {run_dir}. Wait for it, or choose another "
                "--run_dir."
            ) from error
        yield


def stopped(number: int, step: int | None) -> Stopped:
    """Return the error that ends a run which was asked to stop."""
    name = signal.Signals(number).name
    saved = "before training began" if step is None else f"step {step} is saved"
    return Stopped(f"stopped by {name}: {saved}. Go on with --ckpt_path auto.", SIGNALS[number])


def own_words(error: BaseException, run_dir: Path) -> BaseException:
    """Return how to tell a user of a failure that is not MiniGPT's; else the error itself."""
    if isinstance(error, MiniGPTError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return stopped(signal.SIGINT, None)
    if isinstance(error, SystemExit):
        return stopped(signal.SIGTERM, None) if error.code == PREEMPTED else error
    broken = isinstance(error, torch.distributed.DistBackendError)
    if broken or (isinstance(error, RuntimeError) and "gloo/transport" in str(error)):
        return ProcessLost(LOST)
    place = next((e.filename for e in chain(error) if isinstance(e, OSError) and e.filename), None)
    return unwritable(error, place or run_dir) or error


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


class RunStatus(Callback):
    """Keeps `status.json`: launchers hide their children's exit codes.

    Args:
        run_dir: where it is written.
        first: whether this process writes it.
    """

    def __init__(self, run_dir: Path, first: bool) -> None:
        self.path, self.first = run_dir / "status.json", first
        self.trainer: Trainer | None = None
        self.exit_code: int | None = None  # how the run has ended

    def _write(self, state: str, exit_code: int | None, reason: str = "") -> None:
        if self.first:
            step = self.trainer and self.trainer.global_step
            status = {"state": state, "exit_code": exit_code, "step": step}
            write_json(self.path, {**status, "time": round(time.time()), "reason": reason})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run is under way."""
        self.trainer = trainer
        self._write("running", None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run is finished: the model is exported."""
        self._write("finished", 0)
        self.exit_code = 0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, error: Any) -> None:
        """The run ended otherwise."""
        self.end(own_words(error, self.path.parent))

    def end(self, error: BaseException) -> None:
        """Write what ended the run, unless that is written."""
        if self.exit_code:
            return
        self.exit_code = code = error.exit_code if isinstance(error, MiniGPTError) else 1
        states = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}
        try:
            self._write(states.get(code, "failed"), code, str(error))
        except OSError as failure:  # a full disk must not hide why the run failed
            log.warning("%s could not be written: %s", self.path, failure.strerror)


class Observer(_ChildProcessObserver):
    """Ends all processes that this one has started, and itself, when one of them has failed.

    Lightning's kills this process at once, with neither a word nor its exit status.

    Args:
        status: says how the run ended.
        processes: those that this one has started.
    """

    def __init__(self, status: RunStatus, processes: list[subprocess.Popen[bytes]]) -> None:
        super().__init__(os.getpid(), processes)
        self.status = status

    def _terminate_all(self) -> None:
        time.sleep(PATIENCE)  # mostly it notices by itself, and this thread ends with it
        if self.status.exit_code is None:
            print(f"minigpt: {LOST}", file=sys.stderr)
            self.status.end(ProcessLost(LOST))
        for process in self._child_processes:
            process.kill()
        os._exit(self.status.exit_code or 0)


def observe(status: RunStatus, held: ExitStack) -> None:
    """Let Lightning's launcher observe the processes that it starts in our way, until the end."""
    name = "_launch_process_observer"
    held.callback(setattr, launcher, name, getattr(launcher, name))
    setattr(launcher, name, lambda started: Observer(status, started).start())
