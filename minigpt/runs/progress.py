"""Speed, and a progress bar with loss, tokens per second and time left."""

from __future__ import annotations

import time
from contextlib import suppress

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from minigpt.stages.base import BaseModule

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Throughput(Callback):
    """Counts useful tokens per second of training, time for validation and samples left out.

    Attributes:
        tokens: tokens of data trained on by all processes since the run was started.
        seconds: time spent on them.
        rate: tokens per second between the last two readings.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.rate = 0.0
        self._before = 0  # tokens that the run had seen when the clock was started
        self._clock = 0.0  # up to which `seconds` are counted, and from which they go on
        self._last = (0, 0.0)  # tokens and seconds at the last reading
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        assert isinstance(pl_module, BaseModule)
        self._before = pl_module.tokens_seen
        self._clock = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again: the time that validation took does not count."""
        self._clock = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock for validation."""
        if not trainer.sanity_checking:
            self._tick()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Count a step's tokens; log the rate with the other metrics."""
        assert isinstance(pl_module, BaseModule)
        self.tokens = pl_module.tokens_seen - self._before
        self._tick()
        is_step = trainer.global_step != self._step
        self._step = trainer.global_step
        if is_step and trainer.global_step % pl_module.log_every == 0:
            tokens, seconds = self._last
            if self.seconds > seconds and self.tokens > tokens:
                self.rate = (self.tokens - tokens) / (self.seconds - seconds)
                self._last = (self.tokens, self.seconds)
                pl_module.log("tokens_per_s", self.rate, rank_zero_only=True)

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now

    @property
    def mean(self) -> float:
        """Useful tokens per second over the run so far."""
        return self.tokens / self.seconds if self.seconds else 0.0


class StepProgress(ProgressBar):
    """Optimizer steps done and left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.enabled = True
        self.held_out: float | None = None
        self._printed_at = 0.0
        self._shown_step = -1

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all ranks but the first)."""
        self.enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        assert isinstance(pl_module, BaseModule)
        super().on_train_start(trainer, pl_module)
        self.total = pl_module.total_steps()
        self.first = trainer.global_step
        self._printed_at = time.monotonic()
        if self.enabled and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("training", total=self.total, numbers="")
            self.bar.start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the held-out loss."""
        loss = trainer.callback_metrics.get("val/loss")
        self.held_out = None if loss is None else float(loss)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Show the step; of its numbers, only those that are on the host already."""
        assert isinstance(pl_module, BaseModule)
        if not self.enabled or trainer.global_step == self._shown_step:
            return
        step = trainer.global_step
        self._shown_step = step
        numbers = self._numbers(pl_module.step_totals)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, numbers=numbers)
        elif time.monotonic() - self._printed_at > LINE_EVERY:
            self._printed_at = time.monotonic()
            left = self.throughput.seconds / max(1, step - self.first) * (self.total - step)
            with suppress(OSError):  # the terminal may be gone
                self.console.print(
                    f"step {step}/{self.total}  {numbers}  {left:.0f} s left", style="dim"
                )

    def _numbers(self, totals: dict[str, float]) -> str:
        parts = [f"loss {totals['loss'] / max(1.0, totals['count']):.3f}" if totals else ""]
        parts.append(f"val {self.held_out:.3f}" if self.held_out is not None else "")
        parts.append(f"{self.throughput.rate or self.throughput.mean:,.0f} tokens/s")
        return "  ".join(part for part in parts if part)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step)
            self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self._close()

    def _close(self) -> None:
        assert self.bar is not None
        with suppress(OSError):  # the terminal may be gone
            self.bar.stop()
        self.bar = None
