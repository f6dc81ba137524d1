"""Loggers: TensorBoard events straight in the run directory, and metrics.jsonl beside them."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from minigpt.files import write_text
from minigpt.lightning_internals import purge_after

log = logging.getLogger(__name__)

# Charts that show training and validation together, in TensorBoard's "Custom scalars" tab.
CHARTS = {
    "loss (nats per target)": ("train/loss", "val/loss"),
    "bits per byte": ("train/bits_per_byte", "val/bits_per_byte"),
    "reward margin": ("train/rewards/margin", "val/rewards/margin"),
    "reward accuracy": ("train/rewards/accuracy", "val/rewards/accuracy"),
    "reward": ("reward", "val/reward"),
    "right answers": ("val/accuracy", "val/pass_at_1"),
}


def chart(*tags: str) -> list[object]:
    """Return a chart of exactly these tags, which TensorBoard takes as regular expressions."""
    return ["Multiline", [f"^{tag}$" for tag in tags]]


LAYOUT = {
    "train and validation": {title: chart(*tags) for title, tags in CHARTS.items()},
    "speed": {"tokens per second": chart("tokens_per_s")},
}


class RunTensorBoard(TensorBoardLogger):
    """TensorBoard events in the run directory itself, with the shared layout."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(save_dir=str(run_dir), name="", version="", default_hp_metric=False)
        self.layout_written = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars; the first call also writes the layout."""
        if not self.layout_written:
            self.layout_written = True
            self.experiment.add_custom_scalars(LAYOUT)
        super().log_metrics({k: v for k, v in metrics.items() if k != "epoch"}, step)

    def rewind(self, steps: int, _: bool) -> None:
        """Let TensorBoard hide what an earlier process logged after `steps` optimizer steps."""
        purge_after(self, steps)  # the first step is logged as 0


class JSONLLogger(Logger):
    """One JSON object a line: step, time and the metrics logged at that step."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / "metrics.jsonl"

    @rank_zero_only
    def rewind(self, steps: int, validation_due: bool) -> None:
        """Take out what an earlier process logged after `steps` optimizer steps.

        A line that was cut off goes, too, and a validation that is about to be made again. Damaged
        lines are left out with a warning; the file as it was stays beside it.
        """
        if not self.path.is_file():
            return
        lines = self._lines()
        damaged = [n for n, (text, row) in enumerate(lines, 1) if text.strip() and not row]
        if damaged:
            copy = shutil.copyfile(self.path, self.path.with_name("metrics-damaged.jsonl"))
            log.warning(
                "%s: %d damaged lines are left out (the first is line %d). The file as it was is "
                "%s.",
                self.path,
                len(damaged),
                damaged[0],
                copy,
            )
        before = [(text, row) for text, row in lines if row and row["step"] < steps]
        last = before[-1][1] if before else {}
        is_validation = last.get("step") == steps - 1 and "val/loss" in last
        is_before_training = steps <= 1 and len(before) == 1  # it is not made again
        if validation_due and is_validation and not is_before_training:
            before.pop()
        write_text(self.path, "".join(f"{text.decode()}\n" for text, _ in before))

    def lacks_step(self, step: int) -> bool:
        """Whether the file has no row of a training step."""
        rows = (row for _, row in self._lines()) if self.path.is_file() else ()
        return not any(row.get("step") == step and "train/loss" in row for row in rows)

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Return the complete lines of the file, each with its row; {} for one that has none."""
        *lines, _ = self.path.read_bytes().split(b"\n")  # the last was cut off, or is empty
        return [(line, parse_line(line)) for line in lines]

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Unused; the run directory is the version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: object, **__: object) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a line, without values that are not finite: JSON cannot hold them."""
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        values = {k: v for k, v in values.items() if math.isfinite(v)}
        if not values:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            row = {"step": step, "time": round(time.time(), 3), **values}
            file.write(json.dumps(row) + "\n")


def parse_line(line: bytes) -> dict[str, Any]:
    """Return what a line of metrics.jsonl logs; {} for one that no logger wrote."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return {}
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and step >= 0 else {}
