"""The model card: how to use the model, what it was trained on, and how well it does."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from minigpt.data.formats import expand_files, iter_rows
from minigpt.errors import ConfigError, DataError
from minigpt.model.restore import MODEL_DIR, find_checkpoint, step_of
from minigpt.reading import read_json, read_text, read_yaml, reason_of, refusing

log = logging.getLogger(__name__)

# Names stand in a file's name, a shell command, Python and a Modelfile; licences in YAML.
NAME = re.compile(r"\w[\w.+@ -]{0,99}")
HUB_NAME = re.compile(r"[\w./@+-]{1,200}")
COUNTED_MB = 500  # of larger data files, the card gives the size instead of the rows
IMPORTS = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
MODEL = 'model = AutoModelForCausalLM.from_pretrained("{path}")\n'
TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
ROWS = (  # not len(tokenizer), which is too few where the ids have gaps
    "rows = max(tokenizer.get_vocab().values()) + 1\n"
    "model.resize_token_embeddings(max(rows, model.config.vocab_size))\n"
)
PEFT = 'model = PeftModel.from_pretrained(model, "{name}")\n'
USAGE = {
    "transformers": IMPORTS + MODEL + TOKENIZER,
    "peft": "from peft import PeftModel\n" + IMPORTS + MODEL + TOKENIZER + ROWS + PEFT,
    "gguf": "ollama create {name} -f Modelfile && ollama run {name}\nllama-cli -m {path}\n",
}
TRAINING_COLUMNS = ["stage", "data", "steps", "tokens seen", "held out, before", "after"]
TRAINING_COLUMNS += ["weights", "ended by"]


@dataclass(frozen=True)
class Card:
    """Writes the model card.

    Args:
        name: of the model.
        model: run directory; the card lists it and the stages that it started from.
        license: an SPDX name such as apache-2.0.
        results: JSON files of numbers, as the `--json` of other verbs writes them.
    """

    name: str
    model: str
    license: str | None = None
    results: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse names and results that cannot stand in a card before the work.

        Raises:
            ConfigError: for a name or a licence with other characters than those of names, or
                results that are no JSON object.
        """
        for option, value in (("name", self.name), ("license", self.license or "none")):
            if not NAME.fullmatch(value):
                raise ConfigError(
                    f"--{option} {value!r:.120} is no name: give up to 100 letters, digits, spaces "
                    "and . _ + @ -."
                )
        for file in self.results:
            read_object(Path(file))

    def write(
        self, directory: Path, numbers: dict[str, Any], base: str | None = None, gguf: str = ""
    ) -> None:
        """Write README.md.

        Args:
            directory: where the export lies.
            numbers: results of the parity check.
            base: path or hub id of the model that an exported adapter belongs to.
            gguf: name of the GGUF file, for an export of one.

        Raises:
            ConfigError: for numbers of the run that are no JSON object.
        """
        kind = "gguf" if gguf else "peft" if base else "transformers"
        head = {"library_name": kind, "pipeline_tag": "text-generation", "tags": ["minigpt"]}
        head |= {"license": self.license} if self.license else {}
        if base and HUB_NAME.fullmatch(base) and not Path(base).exists():
            head["base_model"] = base
        elif base:  # a path of this machine tells others nothing
            base = "path/to/the/base"
        use = USAGE[kind].format(name=self.name, path=gguf or base or self.name)
        versions = [
            f"{name} {version(name)}" for name in ("minigpt", "torch", "transformers", "peft")
        ]
        sections = [
            f"---\n{yaml.safe_dump(head)}---\n# {self.name}\n\n```\n{use}```",
            table("Training", TRAINING_COLUMNS, stages(Path(self.model))),
            *(table(t, ("measure", "value"), flat(results)) for t, results in self._results()),
            table("Parity of this export", ("check", "value"), flat(numbers)),
            f"## Licence\n\n{self.license or 'Not stated.'}",
            f"Made with {', '.join(versions)}.\n",
        ]
        (directory / "README.md").write_text("\n\n".join(filter(None, sections)), encoding="utf-8")

    def _results(self) -> Iterator[tuple[str, object]]:
        run = Path(self.model)
        if (run / "exam.json").is_file():
            exam, step = read_object(run / "exam.json"), exported_step(run)
            if exam.get("step") in (None, step):  # earlier versions did not write it
                yield "Exam", exam_scores(exam)
            else:
                log.warning(
                    "exam.json is of step %s, the model of step %s: the card leaves it out. "
                    "`minigpt test` asks the exam again.",
                    exam["step"],
                    step,
                )
        for file in self.results:
            yield f"Results: {Path(file).stem}", read_object(Path(file))


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object, or raise a ConfigError."""
    try:
        return read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} cannot be read as JSON: {reason_of(error)}. Give results as --json writes "
            "them."
        ) from error


def exported_step(run: Path) -> object:
    """Return after how many optimizer steps a run's exported weights are; None if unknown."""
    if not (run / "summary.json").is_file():
        return None
    exported = read_object(run / "summary.json").get("exported")
    return exported.get("step") if isinstance(exported, dict) else None


def exam_scores(exam: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of exam.json, without those of the demo's exams in a run on other data."""
    scores, demo = exam.get("scores"), exam.get("demo_families")
    left_out = {f"exam/{family}" for family in demo} if isinstance(demo, list) else set()
    if not isinstance(scores, dict):
        return {}
    return {name: score for name, score in scores.items() if name not in left_out}


def stages(run: Path) -> list[list[object]]:
    """Return a row of `TRAINING_COLUMNS` for a run or checkpoint, and each that it started from.

    Those come first that were trained first.

    Raises:
        ConfigError: when what a run says of itself is damaged.
    """
    rows: list[list[object]] = []
    seen: set[Path] = set()
    while True:
        run = run.parent if run.name == MODEL_DIR else run
        checkpoint = find_checkpoint(run)
        run = run if checkpoint is None else checkpoint.absolute().parent.parent
        has_summary = checkpoint is not None or (run / "summary.json").is_file()
        if not (has_summary and (run / "config.yaml").is_file()) or run.resolve() in seen:
            return rows[::-1]
        seen.add(run.resolve())
        with refusing(f"What {run} says of itself", ConfigError, verb="is damaged"):
            config = read_yaml(run / "config.yaml")
            result = _summary(run) if checkpoint is None else _measured(run, step_of(checkpoint))
            rows.append([run.resolve().name, _data(config), *result])
            start = config["model"]["init_args"].get("init_from")
        if not start:
            return rows[::-1]
        run = Path(start)


def _data(config: dict[str, Any]) -> str:
    train = config["data"]["init_args"].get("train")
    files = [train] if isinstance(train, str) else train or []
    return ", ".join(f"{Path(name).name} ({_rows_of_all(name)})" for name in files)


def _rows_of_all(name: str) -> str:
    """Return how many rows a data file has, or all files of a folder or pattern."""
    try:
        files = expand_files([name])
    except ConfigError:
        return "not found any more"
    if files == [name]:
        return rows_of(Path(name))
    return f"{len(files)} files, {rows_of(*map(Path, files))}"


def _summary(run: Path) -> list[object]:
    """Return steps, tokens, losses, and which weights `hf/` holds, of a run that has ended."""
    summary = read_object(run / "summary.json")
    exported = summary.get("exported", {})  # which earlier versions did not write
    after = exported.get("held_out", summary.get("final", {}))
    measured = [held_out(values) for values in (summary.get("before", {}), after)]
    weights = f"{exported['weights']}, step {exported['step']}" if exported else None
    totals = [summary.get("steps"), summary.get("tokens_seen")]
    return [*totals, *measured, weights, summary.get("ended")]


def _measured(run: Path, steps: int) -> list[object]:
    """Return the same of a checkpoint, from the metrics logged before training and at its step."""
    lines = read_text(run / "metrics.jsonl").splitlines()
    rows = [row for row in map(parse_line, lines) if row.get("step") in (0, steps - 1)]
    before = next(filter(None, map(held_out, rows)), None)
    at_step = {key: value for row in rows if row["step"] == steps - 1 for key, value in row.items()}
    tokens, after = at_step.get("tokens_seen"), held_out(at_step)
    return [steps, tokens, before, after, f"checkpoint, step {steps}", None]


def held_out(metrics: dict[str, Any]) -> str | None:
    """Return what a stage's validation is judged by: its loss, or GRPO's share of right answers."""
    for name, label in (("val/loss", "loss"), ("val/accuracy", "accuracy")):
        if name in metrics:
            return f"{label} {metrics[name]:.4g}"
    return None


def parse_line(line: str) -> dict[str, Any]:
    """Return a row of metrics.jsonl; {} for a damaged line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def rows_of(*files: Path) -> str:
    """Return how many rows data files have now, or why they cannot be counted."""
    if not all(file.is_file() for file in files):
        return "not found any more"
    if (size := sum(file.stat().st_size for file in files) / 1e6) > COUNTED_MB:
        return f"{size:.0f} MB"
    try:
        return f"{sum(1 for file in files for _ in iter_rows(file))} rows"
    except DataError:
        return "not readable any more"


def flat(values: object, path: str = "") -> list[list[object]]:
    """Return [path, value] for each number or word in nested objects; lists are left out."""
    if isinstance(values, dict):
        return [row for key in values for row in flat(values[key], f"{path}.{key}".strip("."))]
    return [[path, values]] if isinstance(values, str | int | float) else []


def table(title: str, head: Sequence[str], rows: list[list[object]]) -> str:
    """Return a Markdown section with a table; nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    rendered = "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
    return f"## {cell(title)}\n\n{rendered}"


def cell(value: object) -> str:
    """Return a value as it stands in a table."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
