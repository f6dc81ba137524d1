"""A report on runs, as HTML and as Markdown from the same parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minigpt.errors import ConfigError
from minigpt.evaluate.scores import Results, Score, share, tables, wilson
from minigpt.files import write_text
from minigpt.page import Html, bar_chart, charts, escape, line_chart, number, page, table
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
        self.markdown += _markdown(head, rows)

    def figures(self, figures: Sequence[Html]) -> None:
        """Add charts, which only the page shows."""
        self.html.append(charts(figures) if figures else "")

    def folded(self, title: str, inside: str) -> None:
        """Add markup of the page alone, shown at a click."""
        summary = f"<summary>{escape(title)}</summary>"
        self.html.append(f"<details>{summary}{inside}</details>\n")

    def folded_table(
        self, title: str, head: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> None:
        """Add a table that is shown at a click."""
        self.folded(title, table(head, rows))
        summary = f"<details><summary>{escape(title)}</summary>"
        self.markdown += [summary, "", *_markdown(head, rows), "</details>", ""]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *([number(cell) for cell in row] for row in rows)]
    return [*(f"| {' | '.join(map(_cell, line))} |" for line in lines), ""]


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def write_report(
    places: Sequence[str | Path], output: Path, results: Sequence[str | Path] = ()
) -> str:
    """Write `output` (HTML) and the same name with `.md`.

    Args:
        places: run directories, or one with a pipeline's ``report.json``, which brings the
            runs beside it.
        output: the page.
        results: files of scores, as ``minigpt evaluate --json`` writes them.

    Returns:
        What the Markdown begins with: the pipeline's results, else the list of runs.

    Raises:
        ConfigError: for a place that holds neither.
    """
    document, runs, scores = Document(), [], read_scores(results)
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
        _curves(document, runs)
        _exams(document, runs)
    add_scores(document, scores)
    if runs:
        for part in (_samples, _data, _origins):
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


def read_scores(files: Sequence[str | Path]) -> dict[str, Results]:
    """Read what `minigpt evaluate --json` wrote, the models of all files side by side.

    Raises:
        ConfigError: for a file that holds something else.
    """
    results: dict[str, Results] = {}
    for file in files:
        try:
            models = json.loads(Path(file).read_text(encoding="utf-8"))["models"]
            for model, tests in models.items():
                for test, scores in tests.items():
                    told = {name: Score(**_numbers(score)) for name, score in scores.items()}
                    results.setdefault(model, {})[test] = told
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file} holds no scores ({type(error).__name__}: {error}). Give a file that "
                "`minigpt evaluate --json FILE` wrote."
            ) from error
    return results


def _numbers(score: dict[str, Any]) -> dict[str, Any]:
    if not all(map(is_number, score.values())):
        raise ValueError("a score is no number")
    return score


def add_scores(document: Document, results: Mapping[str, Results]) -> None:
    """Add a table for each test, one column for each model, and its main share as bars."""
    for test, body in tables(results).items():
        document.heading(test)
        document.table(("", *results, "chance", "items"), body)
        for name in (row[0] for row in body):
            given = {m: s for m, tests in results.items() if (s := tests.get(test, {}).get(name))}
            if all(score.high is not None for score in given.values()):
                document.figures([bars(f"{test}: {name}", given)])
                break
    if results:
        document.note("Shares with their 95% interval (Wilson).")


def _samples(document: Document, runs: Sequence[Run]) -> None:
    """Add the replies to fixed prompts: the last ones in sight, all of them at a click."""
    sampled = [run for run in runs if run.samples]
    if sampled:
        document.heading("Samples")
    for run in sampled:
        last = run.samples[-1][0]
        rows = [(run.name, prompt, reply) for step, prompt, reply in run.samples if step == last]
        document.table(("run", "prompt", f"reply at step {last}"), rows)
        every = [(str(step), prompt, reply) for step, prompt, reply in run.samples]
        document.folded_table(f"{run.name}: over time", ("step", "prompt", "reply"), every)


def _data(document: Document, runs: Sequence[Run]) -> None:
    """Add what is known of each file, and how long its samples are."""
    rows, figures = [], []
    for run in runs:
        for split in ("train", "val"):
            told = found(run.summary, f"data {split}", list) or []
            named = {"file": _files(found(run.config, f"data init_args {split}"))}
            for one in [one for one in told if isinstance(one, dict)] or [named]:
                counts = [one.get(name) for name in COUNTS]
                cut, of = one.get("cut"), one.get("rows")
                over = f"{cut / of:.1%}" if is_number(cut) and is_number(of) and of else None
                rows.append((run.name, split, one.get("file"), *counts, over))
                lengths = [b for b in found(one, "lengths", list) or [] if _is_bar(b)]
                if lengths:
                    title = f"{run.name} {split}: samples by tokens ({over} of rows were longer)"
                    figures.append(bar_chart(title, lengths))
    document.heading("Data")
    document.table(("run", "split", "file", *COUNTS, "over max_length"), rows)
    document.figures(figures)


def _is_bar(value: object) -> bool:
    """Whether a value of a JSON file is a label with a number."""
    return isinstance(value, list) and len(value) == 2 and is_number(value[1])


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
