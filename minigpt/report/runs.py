"""Read run directories. What is missing or damaged is stated, never guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from minigpt.errors import ConfigError
from minigpt.reading import read_json, read_text, read_yaml, reason_of

Value = TypeVar("Value")
LARGEST_NUMBER = 1e30  # that can be drawn
RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "exam.json")
STAGE_NAMES = {"Pretrain": "Pretraining", "Reward": "Reward model"}  # others: as the class


@dataclass
class Run:
    """A run directory.

    Attributes:
        name: of the run in the report.
        config, summary, exam: what the files of these names hold.
        metrics: rows of metrics.jsonl.
        samples: (step, prompt, reply) in order.
        gaps: what could not be read, in words.
    """

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exam: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[int, str, str]] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    @property
    def stage(self) -> str:
        """Name of the stage that the run trained."""
        stage = lookup(self.summary, "stage", str) or lookup(self.config, "model class_path", str)
        name = (stage or "unknown").rpartition(".")[2].removesuffix("Module")
        return STAGE_NAMES.get(name, name)

    def series(self, metric: str) -> list[tuple[float, float]]:
        """Return (step, value) of a metric."""
        points = [(r["step"], r[metric]) for r in self.metrics if is_number(r.get(metric))]
        return sorted(points, key=lambda point: point[0])

    def read(self, name: str, parse: Callable[[Path], Value], empty: Value) -> Value:
        """Return a file of the run, or `empty` with a gap noted."""
        try:
            value = parse(self.path / name)
            if isinstance(value, type(empty)):
                return value
            self.gaps.append(f"{name} is damaged: it holds no object")
        except FileNotFoundError:
            if name != "exam.json":
                self.gaps.append(f"{name} is missing")
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            self.gaps.append(f"{name} is damaged: {reason_of(error)}")
        return empty


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number, of a size that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST_NUMBER < value < LARGEST_NUMBER


def lookup(value: object, path: str, kind: type[Value] = object) -> Value | None:  # type: ignore[assignment]
    """Follow a path of keys through the content of a file; None where it ends or is no `kind`."""
    for key in path.split():
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, kind) else None


def run_directory(path: str | Path) -> Path:
    """Return the run directory that a path names itself, or by one of its checkpoints."""
    folder = Path(path)
    parent = folder.absolute().parent
    return parent.parent if parent.name == "checkpoints" else folder


def read_run(path: str | Path) -> Run:
    """Read a run directory, also by the path of one of its checkpoints.

    Raises:
        ConfigError: when it holds no run at all.
    """
    folder = run_directory(path)
    if not any((folder / name).is_file() for name in RUN_FILES):
        raise ConfigError(
            f"There is no run in {folder}: it has none of {', '.join(RUN_FILES)}. Name a directory "
            "that `minigpt fit` wrote, such as outputs/pretrain."
        )
    run = Run(folder, folder.resolve().name)
    run.config = run.read("config.yaml", read_yaml, {})
    run.summary = run.read("summary.json", read_json, {})
    run.exam = run.read("exam.json", read_json, {})
    run.metrics = run.read("metrics.jsonl", lambda file: _metrics(file, run.gaps), [])
    run.samples = _samples(run)
    return run


def _metrics(file: Path, gaps: list[str]) -> list[dict[str, Any]]:
    rows, bad = [], 0
    for line in read_text(file).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append(row)
        else:
            bad += 1
    if bad:
        gaps.append(f"metrics.jsonl: {bad} damaged lines were left out")
    return rows


def _samples(run: Run) -> list[tuple[int, str, str]]:
    """Read the replies logged as text to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    replies: dict[tuple[int, str], str] = {}
    for file in sorted(run.path.glob("events.out.tfevents.*")):
        try:
            events = EventAccumulator(str(file), size_guidance={"tensors": 0, "scalars": 1})
            events.Reload()
            if "samples/text_summary" not in events.Tags()["tensors"]:
                continue
            for event in events.Tensors("samples/text_summary"):
                text = event.tensor_proto.string_val[0].decode()
                _, *fields = re.split(r"(?:^|\n\n)\*\*(.+?)\*\*\n\n> ?", text, flags=re.DOTALL)
                pairs = zip(fields[::2], fields[1::2], strict=True)
                replies |= {(event.step, prompt): reply for prompt, reply in pairs}
        except Exception as error:  # a damaged event file raises whatever its bytes make it
            run.gaps.append(f"{file.name} is damaged: {type(error).__name__}")
    return [(step, prompt, reply) for (step, prompt), reply in sorted(replies.items())]
