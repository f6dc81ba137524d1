"""How a run ends: the error that a user reads, the exit code, and `status.json`."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, Timer

from minigpt.data.datamodule import JSONLDataModule
from minigpt.errors import (
    INTERRUPTED,
    PREEMPTED,
    ConfigError,
    MiniGPTError,
    ModelError,
    ProcessLost,
    Stopped,
    Terminated,
    TrainingError,
    chain,
)
from minigpt.files import unwritable, write_json
from minigpt.machine import peak_memory
from minigpt.reading import reason_of
from minigpt.runs.claim import make_way
from minigpt.stages.base import BaseModule

log = logging.getLogger(__name__)

SIGNALS: dict[int, int] = {
    signal.SIGTERM: PREEMPTED,
    signal.SIGINT: INTERRUPTED,
    signal.SIGUSR1: PREEMPTED,
    signal.SIGHUP: PREEMPTED,
}

LOST = (
    "Another process of this run has died or does not answer; its own output says why. "
    "Go on from the last checkpoint with --ckpt_path auto."
)
GRACE_SECONDS = 10  # in which the first process may end by itself when another has died


def stopped(number: int, step: int | None) -> Stopped:
    """Return the error that ends a run which was asked to stop."""
    name = signal.Signals(number).name
    saved = "before training began" if step is None else f"step {step} is saved"
    return Stopped(f"stopped by {name}: {saved}. Go on with --ckpt_path auto.", SIGNALS[number])


def out_of_memory(error: BaseException, data: JSONLDataModule | None) -> TrainingError | None:
    """Return the error for a full memory, with the setting to halve; None for other errors."""
    on_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)
    if not (isinstance(error, torch.OutOfMemoryError) or on_cpu):
        return None
    peaks = peak_memory()
    where, peak = "memory", peaks["peak_rss_mb"]
    if not on_cpu and "peak_gpu_mb" in peaks:
        where, peak = "GPU's memory", peaks["peak_gpu_mb"]
    budget = "data.init_args.tokens_per_batch"
    remedy = f"Halve {budget}"
    if data is not None:
        remedy += f", which is {data.tokens_per_batch:,}"
        if data.tokens_per_batch // 2 < data.longest_sample:
            remedy = f"Halve data.init_args.max_length, which is {data.limits.max_length:,}, and "
            remedy += f"{budget}, which is {data.tokens_per_batch:,}"
        elif data.tokens_per_step is None:
            remedy += ", and double trainer.accumulate_grad_batches, by which the steps stay alike"
    return TrainingError(
        f"The {where} is full; the peak was {peak / 1000:.2f} GB. {remedy}. Or set "
        "model.init_args.activation_checkpointing to true, which takes less and computes a third "
        "more. A run that has checkpoints goes on with --ckpt_path auto --allow_changes true."
    )


def as_user_error(
    error: BaseException, run_dir: Path, data: JSONLDataModule | None = None
) -> BaseException:
    """Return the error that a user reads for a failure; an unexpected one stays as it is.

    Args:
        error: what ended the run.
        run_dir: where it wrote.
        data: what it was trained on, if it came so far.
    """
    if isinstance(error, MiniGPTError):
        return error
    if (full := out_of_memory(error, data)) is not None:
        return full
    if isinstance(error, KeyboardInterrupt):
        return stopped(signal.SIGINT, None)
    if isinstance(error, Terminated):
        return stopped(error.number, None)
    is_monitored = str(error).startswith("Early stopping conditioned on metric")
    if is_monitored or isinstance(error, MisconfigurationException):
        return misconfigured(error)
    is_nccl = isinstance(error, torch.distributed.DistBackendError)
    is_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    if is_nccl or is_gloo:
        return ProcessLost(LOST)
    files = (e.filename for e in chain(error) if isinstance(e, OSError) and e.filename)
    return unwritable(error, next(files, run_dir)) or error


@contextmanager
def restoring(checkpoint: Path) -> Iterator[None]:
    """Refuse a checkpoint whose values a run cannot go on from, whatever error they lead to.

    Errors with another reason, such as a full memory, pass.

    Raises:
        ModelError: for such values.
    """
    try:
        yield
    except Exception as error:
        if (user_error := as_user_error(error, checkpoint)) is not error:
            raise user_error from error
        if isinstance(error, MiniGPTError):
            raise
        raise ModelError(
            f"The checkpoint {checkpoint} cannot be loaded: {reason_of(error).rstrip('.')}. Use "
            "another one, or start a new run."
        ) from error


def why_it_ended(trainer: Trainer, module: BaseModule) -> str:
    """Return which limit or callback has ended a training that did not fail."""
    if trainer.global_step >= module.total_steps():
        by_steps = 0 < trainer.max_steps <= trainer.global_step
        return "max_steps" if by_steps else "max_epochs"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and (callback.time_remaining() or 0.0) <= 0:
            return "max_time"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"early stopping: {' '.join(callback.stopping_reason_message.split())}"
    return "a callback"


def misconfigured(error: BaseException) -> ConfigError:
    """Return what Lightning says of an option of the Trainer, or of a class given to it."""
    return ConfigError(f"trainer: {' '.join(str(error).split())}")


class RunStatus(Callback):
    """Writes `status.json`, since launchers hide the exit codes of their children.

    Args:
        run_dir: where it is written.
        first: whether this is the first process, which alone writes it.
    """

    def __init__(self, run_dir: Path, first: bool) -> None:
        self.path = run_dir / "status.json"
        self.first = first
        self.trainer: Trainer | None = None
        self.exit_code: int | None = None  # how the run has ended

    def _write(self, state: str, exit_code: int | None, reason: str = "") -> None:
        if self.first:
            step = None if self.trainer is None else self.trainer.global_step
            status = {"state": state, "exit_code": exit_code, "step": step}
            try:
                write_json(self.path, {**status, "time": round(time.time()), "reason": reason})
            except OSError as error:  # neither ends a run nor hides why it failed
                log.warning("%s could not be written: %s", self.path, error.strerror)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that the run is under way."""
        self.trainer = trainer
        if self.first:
            make_way(self.path.parent)
        self._write("running", None)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that the run is finished: the model is exported."""
        assert isinstance(pl_module, BaseModule)
        self._write("finished", 0, why_it_ended(trainer, pl_module))
        self.exit_code = 0

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, error: BaseException
    ) -> None:
        """Write what ended the run."""
        assert isinstance(pl_module, BaseModule)
        self.end(as_user_error(error, self.path.parent, pl_module.data))

    def end(self, error: BaseException) -> None:
        """Write what ended the run, unless that is written already."""
        if self.exit_code:
            return
        self.exit_code = code = error.exit_code if isinstance(error, MiniGPTError) else 1
        states = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}
        self._write(states.get(code, "failed"), code, str(error))

    def exit_code_after_death(self) -> int:
        """Return the exit status of a run of which another process has died.

        Called in a thread. Most runs notice by themselves and end within `GRACE_SECONDS`, and this
        thread with them.
        """
        time.sleep(GRACE_SECONDS)
        if self.exit_code is None:
            print(f"minigpt: {LOST}", file=sys.stderr)
            self.end(ProcessLost(LOST))
        return self.exit_code or 0
