"""A report on runs, as HTML and as Markdown from the same parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minigpt.errors import ConfigError
from minigpt.evaluate.scores import Score, share, wilson
from minigpt.files import write_text
from minigpt.report.page import Html, bar_chart, charts, escape, line_chart, number, page, table
from minigpt.report.runs import Run, found, is_number, read_run

GENERAL = ("asked_new_wording", "never_asked", "skills")
CURVES = {
    "Loss": ("loss", "nats"),
    "Bits per byte": ("bits_per_byte", "bits"),
    "Reward margin": ("rewards/margin", ""),
    "Reward accuracy": ("rewards/accuracy", "share of pairs"),
    "Learning rate": ("lr", ""),
    "Gradient norm": ("grad_norm", ""),
    "Throughput": ("tokens_per_s", "tokens per second"),
}
COUNTS = ("rows", "samples", "tokens", "targets", "cut")
# Of the pipeline: stage, exam, where the score before lies, where the one after, whose items.
EXAMS = (
    ("SFT", "general exam", "sft exam_before", "sft exam_after", GENERAL),
    *(("", f"  {f.replace('_', ' ')}", "", f"sft families {f}", (f,)) for f in GENERAL),
    ("DPO", "reward accuracy, held out", "", "dpo reward_accuracy", ("dpo_val",)),
    ("", "preferred style", "dpo preferred_style_before", "dpo preferred_style_after", ("style",)),
    ("", "  with the right tip", "dpo right_advice_before", "dpo right_advice_after", ("advice",)),
    ("", "general exam", "sft exam_after", "dpo exam_after", GENERAL),
    ("LoRA", "domain exam", "lora domain_before", "lora domain_after", ("medical",)),
    ("", "general exam", "sft exam_after", "lora exam_after", GENERAL),
)


class Document:
    """Collects the parts of a report in both formats."""

    def __init__(self) -> None:
        self.html: list[str] = []
        self.markdown: list[str] = []

    def heading(self, text: str) -> None:
        """Start a section."""
        self.html.append(f"<h2>{escape(text)}</h2>\n")
        self.markdown += [f"## {text}", ""]

    def note(self, text: str) -> None:
        """Add a sentence."""
        self.html.append(f'<p class="soft">{escape(text)}</p>\n')
        self.markdown += [text, ""]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table."""
        self.html.append(table(head, rows))
        lines = [[number(cell) for cell in row] for row in rows]
        lines = [["---"] * len(head), *lines]
        self.markdown += [f"| {' | '.join(map(_cell, row))} |" for row in [list(head), *lines]]
        self.markdown.append("")

    def figures(self, figures: Sequence[Html]) -> None:
        """Add charts, which only the page shows."""
        self.html.append(charts(figures) if figures else "")

    def folded(self, title: str, inside: str) -> None:
        """Add markup of the page alone, shown at a click."""
        summary = f"<summary>{escape(title)}</summary>"
        self.html.append(f"<details>{summary}{inside}</details>\n")


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def write_report(places: Sequence[str | Path], output: Path) -> str:
    """Write `output` (HTML) and the same name with `.md`.

    Args:
        places: run directories, or one with a pipeline's ``report.json``, which brings the
            runs beside it.
        output: the page.

    Returns:
        What the Markdown begins with: the pipeline's results, else the list of runs.

    Raises:
        ConfigError: for a place that holds neither.
    """
    document, runs = Document(), []
    for place in map(Path, places):
        if (place / "report.json").is_file():
            report = _read_json(place / "report.json")
            _pipeline(document, report)
            stages = [place.parent / name for name in report.get("stages", {})]
            runs += [read_run(stage) for stage in stages if (stage / "config.yaml").is_file()]
        else:
            runs.append(read_run(place))
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)
    first = "\n".join(document.markdown)
    if runs:
        _runs(document, runs)
        first = first or "\n".join(document.markdown)
        for part in (_curves, _exams, _samples, _data, _origins):
            part(document, runs)
    write_text(output, page("MiniGPT report", "".join(document.html)))
    write_text(output.with_suffix(".md"), "\n".join(["# MiniGPT report", "", *document.markdown]))
    return first


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or not isinstance(value.get("stages", {}), dict):
            raise ValueError("it holds no report")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged: {error}. Make it again with: make pipeline"
        ) from error
    return value


def _scored(report: dict[str, Any], path: str, families: Sequence[str]) -> Score | None:
    value: Any = found(report, f"stages {path}") if path else None
    if not is_number(value):
        return None
    n = sum(found(report, f"items {family}", int) or 0 for family in families)
    return Score(value, n, *wilson(value * n, n)) if n else Score(value)


def _percent(score: Score | None) -> str:
    if score is None:
        return ""
    return str(score) if score.n else f"{100 * score.value:.1f}%"


def _pipeline(document: Document, report: dict[str, Any]) -> None:
    """Add the exam table stage by stage, what was checked, times and machine."""
    document.heading("Pipeline")
    bits = [found(report, f"stages pretrain {k}") for k in ("val_bpb_untrained", "val_bpb")]
    told = [f"{b:.3f}" if is_number(b) else "" for b in bits]
    rows = [("pretrain", "bits per byte, held out", *told)]
    steps: dict[str, dict[str, Score]] = {}
    stage = ""
    for name, exam, before, after, families in EXAMS:
        stage = name or stage
        scores = [_scored(report, path, families) for path in (before, after)]
        rows.append((name, exam, *map(_percent, scores)))
        for label, score in zip((f"before {stage}", stage), scores, strict=True):
            if score and not (label.startswith("before") and exam in steps):
                steps.setdefault(exam, {})[label] = score
    document.table(("stage", "exam", "before", "after"), rows)
    if report.get("items"):
        document.note("In brackets: 95% intervals (Wilson).")
    document.figures([bars(exam.strip(), s) for exam, s in steps.items() if len(s) > 1])
    for key, what in (
        ("merged_equals_adapter", "Merged adapter gives the same answers"),
        ("adapter_off_equals_base", "Adapter off equals the base"),
    ):
        document.note(f"{what}: {found(report, f'stages lora {key}')}.")
    document.table(("stage", "seconds"), list((found(report, "seconds", dict) or {}).items()))
    machine = found(report, "machine", dict) or {}
    document.note("Machine: " + ", ".join(f"{k} {v}" for k, v in machine.items()))


def bars(title: str, scores: Mapping[str, Score]) -> Html:
    """Draw shares as bars in percent, with their intervals where all have one."""
    bounds = [
        (100 * s.low, 100 * s.high)
        for s in scores.values()
        if s.low is not None and s.high is not None
    ]
    values = [(label, round(100 * s.value, 1)) for label, s in scores.items()]
    whiskers = bounds if len(bounds) == len(values) else ()
    return bar_chart(title, values, intervals=whiskers, largest=100, unit="%")


def _runs(document: Document, runs: Sequence[Run]) -> None:
    """Add what each run was, cost and reached."""
    document.heading("Runs")
    keys = ("steps", "tokens_seen", "seconds", "useful_tokens_per_s", "peak_rss_mb")
    head = ("run", "stage", "steps", "tokens", "seconds", "tokens/s", "peak MB", "loss", "bpb")
    rows = []
    for run in runs:
        edges = (
            [found(run.summary, f"{when} val/{metric}") for when in ("before", "final")]
            for metric in ("loss", "bits_per_byte")
        )
        reached = ["\u00a0→\u00a0".join(number(v) for v in e if is_number(v)) for e in edges]
        rows.append((run.name, run.stage, *(found(run.summary, k) for k in keys), *reached))
    document.table(head, rows)
    document.note("Loss (nats per target) and bits per byte: held out, before → after.")


def _curves(document: Document, runs: Sequence[Run]) -> None:
    """Draw the runs of a stage over each other."""
    for stage in dict.fromkeys(run.stage for run in runs):
        group = [run for run in runs if run.stage == stage]
        figures = []
        for title, (metric, unit) in CURVES.items():
            kinds = {"train": f"train/{metric}", "val": f"val/{metric}", "": metric}
            lines = {
                f"{run.name} {kind}".strip() if len(group) > 1 else kind or metric: points
                for run in group
                for kind, key in kinds.items()
                if (points := run.series(key))
            }
            if lines:
                figures.append(line_chart(title, lines, y_label=unit))
        if figures:
            names = ", ".join(run.name for run in group)
            document.html.append(f"<h2>{escape(stage)}: {escape(names)}</h2>")
            document.figures(figures)


def _exams(document: Document, runs: Sequence[Run]) -> None:
    """Add the exams that `minigpt test` held, each family with its interval."""
    taken: dict[str, dict[str, Score]] = {}
    for run in runs:
        replies = run.exam.get("replies")
        families: dict[str, list[bool]] = {}
        for reply in replies if isinstance(replies, list) else []:
            if isinstance(reply, dict):
                families.setdefault(str(reply.get("family")), []).append(bool(reply.get("right")))
        for family, rights in families.items():
            taken.setdefault(family, {})[run.name] = share(rights)
    if taken:
        document.heading("Exams")
        names = list(dict.fromkeys(name for scores in taken.values() for name in scores))
        rows = [(f, *(_percent(scores.get(name)) for name in names)) for f, scores in taken.items()]
        document.table(("exam", *names), rows)
        document.figures([bars(family, scores) for family, scores in taken.items()])


def _samples(document: Document, runs: Sequence[Run]) -> None:
    """Add the replies to fixed prompts: the last ones in sight, all of them at a click."""
    sampled = [run for run in runs if run.samples]
    if sampled:
        document.heading("Samples")
    for run in sampled:
        last = run.samples[-1][0]
        rows = [(run.name, prompt, reply) for step, prompt, reply in run.samples if step == last]
        document.table(("run", "prompt", f"reply at step {last}"), rows)
        document.folded(
            f"{run.name}: over time",
            table(("step", "prompt", "reply"), [(str(s), p, r) for s, p, r in run.samples]),
        )


def _data(document: Document, runs: Sequence[Run]) -> None:
    """Add what is known of each file."""
    rows = []
    for run in runs:
        for split in ("train", "val"):
            told = found(run.summary, f"data {split}", list) or []
            named = {"file": _files(found(run.config, f"data init_args {split}"))}
            for one in [one for one in told if isinstance(one, dict)] or [named]:
                counts = [one.get(name) for name in COUNTS]
                rows.append((run.name, split, one.get("file"), *counts))
    document.heading("Data")
    document.table(("run", "split", "file", *COUNTS), rows)


def _files(option: object) -> str | None:
    """Write the files of a config: one, a list, or a mapping to weights."""
    if isinstance(option, list | dict):
        return ", ".join(map(str, option))
    return None if option is None else str(option)


def _origins(document: Document, runs: Sequence[Run]) -> None:
    """Add hardware, versions and configs, and say what could not be read."""
    document.heading("Hardware and versions")
    told = {run.name: found(run.summary, "machine", dict) or {} for run in runs}
    keys = list(dict.fromkeys(key for machine in told.values() for key in machine))
    if keys:
        rows = [(name, *(str(m.get(k, "–")) for k in keys)) for name, m in told.items()]
        document.table(("run", *keys), rows)
    else:
        document.note("The runs did not record them.")
    document.html.append("<h2>Configs</h2>")
    for run in runs:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        document.folded(run.name, f"<pre>{escape(text)}</pre>")
    for run in runs:
        for gap in run.gaps:
            document.note(f"{run.name}: {gap}.")
