"""Callbacks that let a run meet its fault at a known moment."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from patience import eventually

from minigpt.data import store


class At(Callback):
    """Sends this process a signal at a moment of the run.

    Args:
        moment: the hook, such as train_batch_start.
        number: at which of its calls, from 0.
        signal_name: which signal.
        rank: in which process.
        after: count only calls after so many optimizer steps.
        group: send it to all processes of the run, as `timeout` and terminals do.
    """

    def __init__(
        self,
        moment: str,
        number: int = 0,
        signal_name: str = "SIGKILL",
        rank: int = 0,
        after: int = 0,
        group: bool = False,
    ) -> None:
        self.left, self.rank, self.after, self.group = number, rank, after, group
        self.signal = signal.Signals[signal_name]
        setattr(self, f"on_{moment}", self._strike)

    def _strike(self, trainer: Any, *_: Any, **__: Any) -> None:
        elsewhere = trainer.sanity_checking or trainer.global_rank != self.rank
        if elsewhere or trainer.global_step < self.after:
            return
        self.left -= 1
        if self.left == -1:
            print(f"struck at {time.time()}", file=sys.stderr, flush=True)
            os.kill(0 if self.group else os.getpid(), self.signal)


class AfterSaving(Callback):
    """Kills this process when a checkpoint is in its place, before anything else happens.

    Args:
        number: after which checkpoint, from 0.
    """

    def __init__(self, number: int) -> None:
        self.left = number

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        save = trainer.save_checkpoint

        def save_and_die(*args: Any, **options: Any) -> None:
            save(*args, **options)
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.save_checkpoint = save_and_die


class CutOff(Callback):
    """Cuts a file of a token store off while a run reads it.

    Args:
        pattern: of its name in the cache.
        cache: the directory of the cache.
        number: at which micro-batch, from 0.
    """

    def __init__(self, pattern: str, cache: str, number: int) -> None:
        self.pattern, self.cache, self.left = pattern, Path(cache), number

    def on_train_batch_start(self, *_: Any) -> None:
        self.left -= 1
        if self.left == -1:
            (file,) = self.cache.glob(self.pattern)
            os.truncate(file, 0)


class FullDisk(Callback):
    """Lets no file grow large from the end of training on, as on a full disk.

    Args:
        size: bytes that still fit.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def on_train_end(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Opened(Callback):
    """Notes which files under a directory are opened during a run.

    Args:
        under: the directory.
        file: gets a line each.
        minigpt_io: leave MiniGPT's way of writing checkpoints, or take Lightning's.
    """

    def __init__(self, under: str, file: str, minigpt_io: bool) -> None:
        self.under, self.file, self.minigpt_io = under, Path(file), minigpt_io
        self.opened: list[str] = []

    def setup(self, trainer: Any, *_: Any, **__: Any) -> None:
        if not self.minigpt_io:
            trainer.strategy.checkpoint_io = TorchCheckpointIO()
        sys.addaudithook(self._note)

    def _note(self, event: str, args: Any) -> None:
        if event == "open" and str(args[0]).startswith(self.under):
            self.opened.append(str(args[0]))

    def on_fit_end(self, *_: Any) -> None:
        self.file.write_text("".join(f"{name}\n" for name in self.opened))


class Slow(Callback):
    """Takes its time over each micro-batch, so that a test can act between two.

    Args:
        seconds: of sleep.
        moment: the hook, where it is not the start of a micro-batch.
        rank: in which process, where it is not in all.
    """

    def __init__(
        self, seconds: float, moment: str = "train_batch_start", rank: int | None = None
    ) -> None:
        self.seconds, self.rank = seconds, rank
        setattr(self, f"on_{moment}", self._sleep)

    def _sleep(self, trainer: Any, *_: Any, **__: Any) -> None:
        if self.rank in (None, trainer.global_rank):
            print("taking its time", file=sys.stderr, flush=True)
            time.sleep(self.seconds)


class Until(Callback):
    """Begins the first micro-batch when a file is there.

    Args:
        file: the file.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(self, *_: Any) -> None:
        eventually(self.file.exists, 600)


class Hold(Callback):
    """Never returns from a function, so that a test can act while it is under way.

    Args:
        function: with its module.
        number: at which of its calls, from 0.
    """

    def __init__(self, function: str, number: int) -> None:
        module, _, name = function.rpartition(".")
        owner, self.left = importlib.import_module(module), number
        plain = getattr(owner, name)

        def blocked(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                while True:
                    time.sleep(1)
            return plain(*args, **options)

        setattr(owner, name, blocked)


class Meet(Callback):
    """Puts a store in its place only when another run has built one, too.

    Args:
        marker: the file that says that this run has.
        other: the file of the other run.
    """

    def __init__(self, marker: str, other: str) -> None:
        publish = store._publish

        def together(*args: Any) -> None:
            Path(marker).touch()
            eventually(Path(other).exists)
            publish(*args)

        store._publish = together


class Poison(Callback):
    """Makes one micro-batch's loss useless.

    Args:
        number: which micro-batch of this process, from 0.
        value: what the loss is multiplied by: nan, inf, or a large number for a jump.
        rank: in which process.
        file: gets the rows of that micro-batch.
    """

    def __init__(self, number: int, value: str, rank: int, file: str) -> None:
        self.number, self.value, self.rank, self.micro_batches = number, float(value), rank, 0
        self.file = Path(file)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.micro_batches == self.number and trainer.global_rank == self.rank:
            compute_loss = pl_module.compute_loss

            def poisoned(batch: Any) -> Any:
                sums = compute_loss(batch)
                sums.loss = sums.loss * self.value
                self.file.write_text("".join(f"{path}:{row}\n" for path, row in batch.sources))
                pl_module.compute_loss = compute_loss
                return sums

            pl_module.compute_loss = poisoned
        self.micro_batches += 1


class Weights(Callback):
    """Notes a digest of weights and optimizer state after each optimizer step.

    Args:
        file: a line each.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        digest = hashlib.sha256()
        for p in pl_module.parameters():
            moments = trainer.optimizers[0].state.get(p, {}).values()
            for value in (p, *(m for m in moments if m.ndim)):
                digest.update(value.detach().numpy().tobytes())
        with self.file.open("a") as file:
            file.write(f"{trainer.global_step} {digest.hexdigest()}\n")


class Rows(Callback):
    """Notes the rows of each micro-batch that a finished optimizer step was made of.

    Args:
        file: gets a line each: the step, the process, and the rows.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.buffered: list[str] = []

    def on_train_batch_start(self, trainer: Any, _: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, _: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if len(batch.labels):  # else it only keeps processes in step
            self.buffered.append(json.dumps([self.step, trainer.global_rank, batch.sources]) + "\n")
        if trainer.global_step > self.step:
            with self.file.open("a") as file:
                file.writelines(self.buffered)
            self.buffered = []


class InReference(Callback):
    """Kills this process while it computes the reference's log-probs, or half-way in writing them.

    Args:
        function: score (one micro-batch) or save (one file of pairs).
        number: at which of its calls, from 0.
    """

    def __init__(self, function: str, number: int) -> None:
        self.function, self.left = function, number

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        owner, name = (pl_module, "_logprobs_of") if self.function == "score" else (np, "savez")
        plain = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                if self.function == "save":
                    args[0].write(b"half")
                    args[0].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **options)

        setattr(owner, name, counted)


class Threads(Callback):
    """Has the run begin with so many threads.

    Args:
        number: of them.
    """

    def __init__(self, number: int) -> None:
        torch.set_num_threads(number)
