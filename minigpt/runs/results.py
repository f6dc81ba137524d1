"""What a run leaves behind: the exported model, a summary, samples, predictions."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from minigpt.data.bundled import is_bundled
from minigpt.data.formats import Message, completed
from minigpt.errors import ConfigError
from minigpt.files import (
    STAGING,
    atomic_file,
    explain_unwritable,
    is_stream,
    others_in,
    system_reason,
    write_json,
)
from minigpt.lightning_internals import validate_now
from minigpt.machine import machine, peak_memory
from minigpt.model.lora import MODEL_FILES
from minigpt.model.parallel import gathered, is_sharded
from minigpt.model.restore import BEST_FILE, STEP_NAME, step_of
from minigpt.reading import read_json
from minigpt.runs.checkpoints import ASIDE, Checkpoints
from minigpt.runs.progress import Throughput
from minigpt.runs.status import why_it_ended
from minigpt.stages.base import BaseModule
from minigpt.stages.evaluation import Completion
from minigpt.terminal import counted

log = logging.getLogger(__name__)

# Patterns of the names that a run writes into its directory of checkpoints.
CHECKPOINT_NAMES = ("step=*", f"{ASIDE}step=*", BEST_FILE, f"{STAGING}*")

Hyperparameter = int | float | str


class RemoveStaleRun(Callback):
    """Removes what an earlier run left, once nothing of the new one can be refused any more.

    Args:
        stale: files and directories.
    """

    def __init__(self, stale: list[Path]) -> None:
        self.stale = stale

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove them."""
        for path in self.stale:
            if path.is_dir() and not path.is_symlink():
                remove_written(path)
            else:
                path.unlink(missing_ok=True)


def remove_written(directory: Path) -> None:
    """Remove what a run has written into one of its directories; what others put there stays."""
    others = others_in(directory, (*MODEL_FILES, *CHECKPOINT_NAMES))
    if not others:
        shutil.rmtree(directory)
        return
    log.warning("%s stays: no run has written it.", ", ".join(map(str, others[:5])))
    for path in directory.iterdir():
        if path in others:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class RunRecorder(Callback):
    """Exports the model when training ends and writes what the run cost and reached.

    Args:
        run_dir: gets `hf/`, `summary.json` and, after `minigpt test`, `exam.json`.
        throughput: measures the speed.
        hyperparameters: logged with the final metrics.
        checkpoints: of a `fit`, which export the model.
    """

    def __init__(
        self,
        run_dir: Path,
        throughput: Throughput,
        hyperparameters: dict[str, Hyperparameter],
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.checkpoints = checkpoints
        self.throughput = throughput
        self.hyperparameters = hyperparameters
        self.before: dict[str, float] = {}
        self.final: dict[str, float] = {}
        self.validated_step = 0
        self.started = time.time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation before the first step, which Lightning does not."""
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            for name, value in trainer.callback_metrics.items():
                log.info("%s: %.4g", name, value)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        held_out = {k: v for k, v in metrics.items() if k.startswith("val/")}
        if not trainer.sanity_checking:
            self.final = held_out
            self.validated_step = trainer.global_step
        else:
            self.before = held_out
            for logger in trainer.loggers:
                logger.log_metrics(self.before, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot measure again."""
        seconds = time.time() - self.started
        return {
            "before": self.before,
            "final": self.final,
            "measured": self.validated_step,
            "seconds": seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore that; the seconds count from where they were."""
        self.before = state_dict["before"]
        self.final = state_dict["final"]
        self.validated_step = state_dict.get("measured", 0)
        self.started -= state_dict["seconds"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the last weights, export them and write the summary."""
        assert isinstance(pl_module, BaseModule)
        if trainer.global_step == 0:  # the validation before the first step was of these weights
            self.final = self.before
        elif trainer.enable_validation and self.validated_step != trainer.global_step:
            validate_now(trainer)
        assert self.checkpoints is not None
        with explain_unwritable(self.run_dir / "hf"):
            exported_step = self.checkpoints.export(pl_module)
        if trainer.is_global_zero:
            self._write_summary(trainer, pl_module, exported_step)
            final = {f"final/{name}": value for name, value in self.final.items()}
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):  # the only one with a table of both
                    logger.log_hyperparams(self.hyperparameters, final)
                else:
                    logger.log_hyperparams(self.hyperparameters)

    def _write_summary(self, trainer: Trainer, module: BaseModule, exported_step: int) -> None:
        assert self.checkpoints is not None
        best = self.checkpoints.best
        exported: dict[str, Any] = {"weights": "last", "held_out": self.final}
        if best is not None and self.checkpoints.options.export == "best":
            exported = {"weights": f"best by {best.metric}", "held_out": best.held_out}
        exported["step"] = exported_step
        summary: dict[str, Any] = {
            "stage": type(module).__name__,
            "steps": trainer.global_step,
            "ended": why_it_ended(trainer, module),
            "seconds": round(time.time() - self.started, 1),
            "tokens_seen": module.tokens_seen,
            "useful_tokens_per_s": round(self.throughput.mean, 1),
            **peak_memory(),
            "before": self.before,
            "final": self.final,
            "final_step": self.validated_step if self.final else None,
            "best": None if best is None else asdict(best),
            "exported": exported,
            "data": module.data.statistics(),
            "machine": machine(),
        }
        write_json(self.run_dir / "summary.json", summary)
        self._log_summary(summary)

    def _log_summary(self, summary: dict[str, Any]) -> None:
        message = f"Trained {counted(summary['steps'], 'step')} in {summary['seconds']:.0f} s"
        message += f" (ended by {summary['ended']})"
        for name in ("loss", "accuracy"):
            if (after := self.final.get(f"val/{name}")) is not None:
                before = self.before.get(f"val/{name}", math.nan)
                message += f"; held-out {name} {before:.3f} → {after:.3f}"
        weights = f"{summary['exported']['weights']}, step {summary['exported']['step']}"
        log.info("%s. The model (%s) is in %s", message, weights, self.run_dir / "hf")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the exam's result and all replies."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, BaseModule)
        scores = {k: float(v) for k, v in trainer.callback_metrics.items()}
        replies = [
            {
                "id": result.item.id,
                "family": result.item.family,
                "answer": result.item.answer,
                "reply": result.reply,
                "ended": result.ended,
                "right": result.correct,
            }
            for result in pl_module.exam_results
        ]
        for name, score in scores.items():  # before the file, which may not be writable
            log.info("%s: %.4g", name, score)
        demo = self._demo_families(pl_module)
        if demo:
            log.warning(
                "%s: exams of the demo, on whose data this run was not trained. Their scores are "
                "in exam.json, and stay out of model cards and reports.",
                ", ".join(demo),
            )
        step = tested_step(self.run_dir, trainer.ckpt_path)
        exam = {"step": step, "scores": scores, "replies": replies, "demo_families": demo}
        write_json(self.run_dir / "exam.json", exam)

    def _demo_families(self, module: BaseModule) -> list[str]:
        """Return the families of the demo's exams, if the run was trained on none of its data."""
        if any(is_bundled(file) for file in trained_on(self.run_dir)):
            return []
        files = [file for file in module.data.exam if is_bundled(file)]
        return sorted({item.family for file in files for item in module.load_exam(file)})


def tested_step(run_dir: Path, checkpoint: object) -> int | None:
    """Return after how many optimizer steps the tested weights were saved; None if unknown.

    Args:
        run_dir: whose exported model is tested.
        checkpoint: that is tested instead, if any.
    """
    if checkpoint:
        path = Path(str(checkpoint))
        return step_of(path) if STEP_NAME.fullmatch(path.name) else None
    try:
        return int(read_json(run_dir / "summary.json")["exported"]["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def trained_on(run_dir: Path) -> list[str]:
    """Return the data files that a finished run was trained on; none where it does not say."""
    try:
        files = read_json(run_dir / "summary.json")["data"]["train"]
        return [str(file["file"]) for file in files]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


class SampleText(Callback):
    """Logs replies to fixed prompts as text at each validation."""

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask and log."""
        assert isinstance(pl_module, BaseModule)
        prompts = pl_module.sample_prompts
        # One process alone cannot compute with shards.
        if not prompts or trainer.state.fn != "fit" or is_sharded(trainer.strategy):
            return
        chats = [(Message("user", prompt),) for prompt in prompts]
        asked = chats if pl_module.source.chat else prompts
        replies = pl_module.engine().complete(asked, pl_module.sampling)
        text = "\n\n".join(
            f"**{prompt}**\n\n> {reply.text}"
            for prompt, reply in zip(prompts, replies, strict=True)
        )
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", text, trainer.global_step)


class PredictionWriter(BasePredictionWriter):
    """Writes predictions as JSONL, in the order of the prompts, completely or not at all.

    Until then each process writes them, in the order that they come, to a file beside it whose name
    ends in .part. That file stays when the run is cut off.

    Args:
        path: each line is the prompt's row with a `completion` added.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("batch_and_epoch")
        self.path = path
        self.part: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin this process's file, before anything is computed."""
        if is_stream(self.path):
            return
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            name = f"{self.path.name}."
            handle, part = tempfile.mkstemp(prefix=name, suffix=".part", dir=self.path.parent)
            os.close(handle)
            self.part = Path(part)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Sequence[Completion],
        batch_indices: Sequence[int] | None,
        batch: object,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write what has been completed."""
        if self.part is None:
            return
        with self._explained(), self.part.open("ab") as file:
            file.writelines(completed(row, text) for _, row, text in prediction)

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Sequence[Completion]],
        batch_indices: Sequence[object],
    ) -> None:
        """Gather all processes' predictions and write them."""
        completions = gathered([each for batch in predictions for each in batch])
        if trainer.is_global_zero:
            ordered = sorted(completions, key=lambda completion: completion[0])
            with self._explained(), atomic_file(self.path) as partial, partial.open("wb") as file:
                file.writelines(completed(row, text) for _, row, text in ordered)
            log.info("%d completions written to %s", len(ordered), self.path)
        trainer.strategy.barrier()
        if self.part is not None:
            self.part.unlink()
            self.part = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, error: BaseException
    ) -> None:
        """Say where the completions are; nothing is left where there are none."""
        if self.part is None:
            return
        if self.part.stat().st_size:
            log.warning("What was completed is in %s.", self.part)
        else:
            self.part.unlink()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = system_reason(error) or error.strerror
            raise ConfigError(
                f"Cannot write to {self.path}: {reason}. Make room there, or name another file "
                "with --predictions."
            ) from error
