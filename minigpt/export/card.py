"""The model card: what the model is, what it was trained on, and how well it does."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from minigpt.data.rows import iter_rows
from minigpt.errors import ConfigError, DataError

COUNTED_MB = 500  # larger data files are told by their size
LIBRARIES = ("torch", "transformers", "tokenizers", "peft")
USE = {
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")
model = AutoModelForCausalLM.from_pretrained("{place}")
""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
""",
    "gguf": """ollama create {name} -f Modelfile && ollama run {name}
llama-cli -m {place}
""",
}


@dataclass(frozen=True)
class Card:
    """What a model card tells.

    Args:
        name: of the model.
        model: run directory; its ancestors' runs are told, too. Else only the name is known.
        license: an SPDX name such as apache-2.0.
        results: JSON files with numbers, as `--json` of other verbs writes them.
    """

    name: str
    model: str
    license: str | None = None
    results: list[str] = field(default_factory=list)

    def write(
        self, directory: Path, numbers: dict[str, Any], base: str | None = None, gguf: str = ""
    ) -> None:
        """Write README.md.

        Args:
            directory: where the export lies.
            numbers: of the parity check.
            base: of an adapter.
            gguf: name of the GGUF file.

        Raises:
            ConfigError: for a file of results that is no JSON object.
        """
        kind = "gguf" if gguf else "peft" if base else "transformers"
        text = "\n".join(self._lines(kind, numbers, base, gguf))
        (directory / "README.md").write_text(text, encoding="utf-8")

    def _lines(
        self, kind: str, numbers: dict[str, Any], base: str | None, gguf: str
    ) -> Iterator[str]:
        head = {"pipeline_tag": "text-generation", "tags": ["minigpt"], "library_name": kind}
        head |= {"license": self.license} if self.license else {}
        head |= {"base_model": base} if base and not Path(base).exists() else {}
        yield f"---\n{yaml.safe_dump(head)}---\n\n# {self.name}\n"
        use = USE[kind].format(name=self.name, place=gguf or self.name, base=base)
        yield f"Trained with MiniGPT.\n\n## Use\n\n```{'sh' if gguf else 'python'}\n{use}```\n"
        runs = lineage(Path(self.model))
        if runs:
            yield "## Training\n"
            yield from table(TRAINING, [training_row(run) for run in runs])
            yield "## Training data\n"
            yield from table(("stage", "file", "rows"), [r for run in runs for r in data_rows(run)])
        for title, values in self._results():
            yield f"## Results: {title}\n"
            yield from table(("measure", "value"), list(flat(values)))
        yield "## Parity of this export\n"
        yield from table(("check", "value"), list(flat(numbers)))
        used = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        yield f"## Versions\n\nMiniGPT {version('minigpt')}, {used}, Python {platform.python_version()}\n"
        yield f"## Licence\n\n{self.license or 'Not stated.'}\n"

    def _results(self) -> Iterator[tuple[str, Any]]:
        run = Path(self.model)
        if (run / "exam.json").is_file():
            yield "exam", read_object(run / "exam.json").get("scores", {})
        report = run.parent / "pipeline" / "report.json"
        if report.is_file():
            yield from [
                (f"pipeline, {stage}", values)
                for stage, values in read_object(report).get("stages", {}).items()
                if stage == run.name
            ]
        for file in self.results:
            yield Path(file).stem, read_object(Path(file))


TRAINING = ("stage", "steps", "tokens seen", "held-out loss before", "after")


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConfigError: when it is missing or something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds no JSON object. Give results as --json writes them.")
    return value


def lineage(run: Path) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return (name, summary, config) of a run and those it started from, the first one first."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    seen: set[Path] = set()
    while True:
        run = run.parent if run.name == "hf" else run
        if run.resolve() in seen or not (run / "summary.json").is_file():
            return found[::-1]
        seen.add(run.resolve())
        config = {}
        if (run / "config.yaml").is_file():
            config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) or {}
        found.append((run.resolve().name, read_object(run / "summary.json"), config))
        start = (config.get("model") or {}).get("init_args", {}).get("init_from")
        if not start:
            return found[::-1]
        run = Path(start)


def training_row(run: tuple[str, dict[str, Any], dict[str, Any]]) -> list[Any]:
    """Return a line of the training table."""
    name, summary, _ = run
    losses = [(summary.get(when) or {}).get("val/loss") for when in ("before", "final")]
    stage = f"{name} ({summary.get('stage', '?')})"
    return [stage, summary.get("steps"), summary.get("tokens_seen"), *losses]


def data_rows(run: tuple[str, dict[str, Any], dict[str, Any]]) -> Iterator[list[Any]]:
    """Yield the lines of the data table: the names of a run's files, without their folders."""
    name, _, config = run
    train = (config.get("data") or {}).get("init_args", {}).get("train")
    files = [train] if isinstance(train, str) else list(train or [])
    for file in files:
        yield [name, Path(file).name, count_rows(Path(file))]


def count_rows(file: Path) -> str:
    """Return how many rows a data file has now, or why that is not known."""
    if not file.is_file():
        return "not found any more"
    size = file.stat().st_size / 1e6
    if size > COUNTED_MB:
        return f"{size:.0f} MB"
    try:
        return str(sum(1 for _ in iter_rows(file)))
    except DataError:
        return "not readable any more"


def flat(values: Any, path: str = "") -> Iterator[list[Any]]:
    """Yield (path, value) of the numbers and words in nested objects; lists are left out."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, str | int | float):
        yield [path, values]


def table(head: tuple[str, ...], rows: list[list[Any]]) -> Iterator[str]:
    """Yield a Markdown table's lines."""
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(cell(value) for value in row)} |"
    yield ""


def cell(value: Any) -> str:
    """Return a value as a table's cell."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
