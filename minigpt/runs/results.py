"""What a run leaves behind: the exported model, a summary, samples, predictions."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from minigpt.data.formats import Message
from minigpt.files import explain_unwritable, write_json, write_text
from minigpt.machine import machine, peak_memory
from minigpt.model.parallel import gathered
from minigpt.runs.progress import Throughput
from minigpt.runs.resume import validate

log = logging.getLogger(__name__)


class MakeRoom(Callback):
    """Removes what an earlier run left, once nothing of the new one can be refused any more.

    Args:
        stale: files and directories.
    """

    def __init__(self, stale: list[Path]) -> None:
        self.stale = stale

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove them."""
        for path in self.stale:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


class RunRecorder(Callback):
    """Exports the model when training ends and writes what the run cost and reached.

    Args:
        run_dir: gets `hf/`, `summary.json` and, after `minigpt test`, `exam.json`.
        throughput: where the speed is read.
    """

    def __init__(self, run_dir: Path, throughput: Throughput) -> None:
        self.run_dir, self.throughput = run_dir, throughput
        self.before: dict[str, float] = {}
        self.final: dict[str, float] = {}
        self.measured = 0  # optimizer steps before the last validation
        self.started = time.time()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the validation before the first step, which Lightning does not."""
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            for name, value in trainer.callback_metrics.items():
                log.info("%s: %.4g", name, value)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        held_out = {k: v for k, v in metrics.items() if k.startswith("val/")}
        if not trainer.sanity_checking:
            self.final, self.measured = held_out, trainer.global_step
        else:
            self.before = held_out
            for logger in trainer.loggers:
                logger.log_metrics(self.before, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on cannot measure again."""
        seconds = time.time() - self.started
        final = {"final": self.final, "measured": self.measured}
        return {"before": self.before, **final, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.before, self.final = state_dict["before"], state_dict["final"]
        self.measured = state_dict.get("measured", 0)
        self.started -= state_dict["seconds"]

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the last weights, export them and sum up."""
        if trainer.enable_validation and self.measured != trainer.global_step:
            validate(trainer)
        with explain_unwritable(self.run_dir / "hf"):
            pl_module.export(self.run_dir / "hf")
        if trainer.is_global_zero:
            self._write_summary(trainer, pl_module)
            for logger in trainer.loggers:
                hyper = getattr(trainer, "hyper", {})
                logger.log_hyperparams(hyper, {f"final/{k}": v for k, v in self.final.items()})

    def _write_summary(self, trainer: Trainer, pl_module: Any) -> None:
        summary = {
            "stage": type(pl_module).__name__,
            "steps": trainer.global_step,
            "seconds": round(time.time() - self.started, 1),
            "tokens_seen": pl_module.tokens_seen,
            "useful_tokens_per_s": round(self.throughput.mean, 1),
            **peak_memory(),
            "before": self.before,
            "final": self.final,
            "data": trainer.datamodule.statistics(),  # type: ignore[attr-defined]
            "machine": machine(),
        }
        write_json(self.run_dir / "summary.json", summary)
        told = f"Trained {summary['steps']} steps in {summary['seconds']:.0f} s"
        if "val/loss" in self.final:
            before = self.before.get("val/loss", math.nan)
            told += f"; held-out loss {before:.3f} → {self.final['val/loss']:.3f}"
        log.info("%s. The model is in %s", told, self.run_dir / "hf")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the exam's result and every reply."""
        if not trainer.is_global_zero:
            return
        scores = {k: float(v) for k, v in trainer.callback_metrics.items()}
        replies = [
            {
                "id": one.item.id,
                "family": one.item.family,
                "answer": one.item.answer,
                "reply": one.reply,
                "ended": one.ended,
                "right": one.correct,
            }
            for one in pl_module.exam_results
        ]
        write_json(self.run_dir / "exam.json", {"scores": scores, "replies": replies})
        for name, score in scores.items():
            log.info("%s: %.4g", name, score)


class SampleText(Callback):
    """Logs replies to fixed prompts as text at each validation."""

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Ask and log."""
        prompts: list[str] = pl_module.sample_prompts
        if not prompts or trainer.state.fn != "fit":
            return
        sharded = pl_module.device_mesh is not None or isinstance(trainer.strategy, FSDPStrategy)
        if sharded:  # one process alone cannot compute with shards
            return
        asked = (
            [(Message("user", prompt),) for prompt in prompts] if pl_module.needs_chat else prompts
        )
        replies = pl_module.engine().complete(asked, pl_module.sampling)
        text = "\n\n".join(
            f"**{prompt}**\n\n> {reply.text}"
            for prompt, reply in zip(prompts, replies, strict=True)
        )
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", text, trainer.global_step)


class PredictionWriter(BasePredictionWriter):
    """Writes predictions as JSONL, in the order of the prompts, whole or not at all.

    Args:
        path: each line is the prompt's row with a `completion` added.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("epoch")
        self.path = path

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: Any, predictions: Any, batch_indices: Any
    ) -> None:
        """Gather all processes' predictions and write them."""
        every = gathered([done for batch in predictions for done in batch])
        if trainer.is_global_zero:
            rows = sorted(every, key=lambda done: done[0])
            done = ({**row, "completion": text} for _, row, text in rows)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in done)
            write_text(self.path, "".join(lines))
            log.info("%d completions written to %s", len(rows), self.path)
