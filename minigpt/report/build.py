"""A report on runs, as HTML and as Markdown from the same sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minigpt.errors import ConfigError
from minigpt.evaluate.scores import Results, Score, share, tables
from minigpt.files import write_text
from minigpt.page import Html, bar_chart, charts, escape, line_chart, number, page, table
from minigpt.reading import read_json, refusing
from minigpt.report.runs import Run, is_number, lookup, read_run

CURVES = {  # the metric of each chart, and the unit of its y axis
    "Loss": ("loss", "nats"),
    "Bits per byte": ("bits_per_byte", "bits"),
    "Reward margin": ("rewards/margin", ""),
    "Reward accuracy": ("rewards/accuracy", "share of pairs"),
    "Reward": ("reward", ""),
    "Right answers": ("accuracy", "share of prompts"),
    "Answers cut off": ("rollout/cut_off", "share of answers"),
    "Entropy": ("entropy", "nats per token"),
    "Learning rate": ("lr", ""),
    "Gradient norm": ("grad_norm", ""),
    "Throughput": ("tokens_per_s", "tokens per second"),
}
COUNTS = ("rows", "samples", "tokens", "targets", "cut")  # of a data file, in summary.json


class Document:
    """Collects the sections of a report in both formats."""

    def __init__(self) -> None:
        self.html: list[str] = []
        self.markdown: list[str] = []

    def heading(self, text: str) -> None:
        """Start a section."""
        self.html.append(f"<h2>{escape(text)}</h2>\n")
        self.markdown += [f"## {' '.join(text.split())}", ""]

    def note(self, text: str) -> None:
        """Add a sentence."""
        self.html.append(f'<p class="soft">{escape(text)}</p>\n')
        self.markdown += [" ".join(text.split()), ""]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table."""
        self.html.append(table(head, rows))
        self.markdown += _markdown(head, rows)

    def figures(self, figures: Sequence[Html]) -> None:
        """Add charts, which only the page shows."""
        self.html.append(charts(figures) if figures else "")

    def folded(self, title: str, body: str) -> None:
        """Add markup of the HTML page alone, shown at a click."""
        summary = f"<summary>{escape(title)}</summary>"
        self.html.append(f"<details>{summary}{body}</details>\n")

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
    run_dirs: Sequence[str | Path],
    output: Path,
    results: Sequence[str | Path] = (),
    introduce: Callable[[Document], None] | None = None,
) -> str:
    """Write `output` (HTML) and the same name with `.md`.

    Args:
        run_dirs: run directories.
        output: the page.
        results: files of scores, as ``minigpt evaluate --json`` writes them.
        introduce: adds sections before those of the runs.

    Returns:
        The beginning of the Markdown: what `introduce` added, else the list of runs.

    Raises:
        ConfigError: for a directory that holds no run.
    """
    document = Document()
    scores = read_scores(results)
    if introduce is not None:
        introduce(document)
    runs = with_unique_names([read_run(run_dir) for run_dir in run_dirs])
    beginning = "\n".join(document.markdown)
    if runs:
        _runs(document, runs)
        beginning = beginning or "\n".join(document.markdown)
        _curves(document, runs)
        _exams(document, runs)
    add_scores(document, scores)
    if runs:
        _samples(document, runs)
        _data(document, runs)
        _provenance(document, runs)
    write_text(output, page("MiniGPT report", "".join(document.html)))
    write_text(output.with_suffix(".md"), "\n".join(["# MiniGPT report", "", *document.markdown]))
    return beginning


def with_unique_names(runs: list[Run]) -> list[Run]:
    """Name runs by their paths where several have the same name."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)
    return runs


def bars(title: str, scores: Mapping[str, Score]) -> Html:
    """Draw shares as bars in percent, with their intervals where all have one."""
    bounds = [
        (100 * s.low, 100 * s.high)
        for s in scores.values()
        if s.low is not None and s.high is not None
    ]
    values = [(label, round(100 * s.value, 1)) for label, s in scores.items()]
    intervals = bounds if len(bounds) == len(values) else ()
    return bar_chart(title, values, intervals=intervals, largest=100, unit="%")


def _runs(document: Document, runs: Sequence[Run]) -> None:
    """Add a table of the runs: their stage, cost and held-out losses."""
    document.heading("Runs")
    keys = ("steps", "tokens_seen", "seconds", "useful_tokens_per_s", "peak_rss_mb")
    head = ("run", "stage", "steps", "tokens", "seconds", "tokens/s", "peak MB", "loss", "bpb")
    rows = []
    for run in runs:
        losses = [_before_and_after(run, metric) for metric in ("loss", "bits_per_byte")]
        costs = (lookup(run.summary, key) for key in keys)
        rows.append((run.name, run.stage, *costs, *losses, *_outcome(run)))
    document.table((*head, "ended by", "hf/ holds"), rows)
    document.note(
        "Loss (nats per target) and bits per byte: held out, before → after the last step. What "
        "hf/ holds: which weights, after how many steps, and their held-out loss."
    )


def _before_and_after(run: Run, metric: str) -> str:
    """Return a held-out metric before the first step and after the last, as far as recorded."""
    values = [lookup(run.summary, f"{when} val/{metric}") for when in ("before", "final")]
    return "\u00a0→\u00a0".join(number(value) for value in values if is_number(value))


def _outcome(run: Run) -> tuple[str | None, str]:
    """Return why a run ended, and which weights it exported."""
    ended = lookup(run.summary, "ended", str)
    weights, step = lookup(run.summary, "exported weights"), lookup(run.summary, "exported step")
    if weights is None or step is None:
        return ended, ""
    loss = lookup(run.summary, "exported held_out val/loss")
    return ended, f"{weights}, step {step}" + (f", loss {number(loss)}" if is_number(loss) else "")


def _curves(document: Document, runs: Sequence[Run]) -> None:
    """Draw the runs of a stage over each other."""
    for stage in dict.fromkeys(run.stage for run in runs):
        group = [run for run in runs if run.stage == stage]
        figures = []
        for title, (metric, unit) in CURVES.items():
            if lines := _lines(group, metric):
                figures.append(line_chart(title, lines, y_label=unit))
        if figures:
            names = ", ".join(run.name for run in group)
            document.html.append(f"<h2>{escape(stage)}: {escape(names)}</h2>")
            document.figures(figures)


def _lines(runs: Sequence[Run], metric: str) -> dict[str, list[tuple[float, float]]]:
    """Return a metric's curves by label: in training, in validation, or where it has no prefix."""
    lines = {}
    several = len(runs) > 1
    for run in runs:
        for kind in ("train", "val", ""):
            points = run.series(f"{kind}/{metric}" if kind else metric)
            if points:
                label = f"{run.name} {kind}".strip() if several else kind or metric
                lines[label] = points
    return lines


def _exams(document: Document, runs: Sequence[Run]) -> None:
    """Add the exams of `minigpt test`, each family with its interval."""
    exams: dict[str, dict[str, Score]] = {}
    for run in runs:
        for family, rights in _right_by_family(run).items():
            exams.setdefault(family, {})[run.name] = share(rights)
    if exams:
        document.heading("Exams")
        names = list(dict.fromkeys(name for scores in exams.values() for name in scores))
        rows = [
            (family, *(str(scores.get(name, "")) for name in names))
            for family, scores in exams.items()
        ]
        document.table(("exam", *names), rows)
        document.figures([bars(family, scores) for family, scores in exams.items()])


def _right_by_family(run: Run) -> dict[str, list[bool]]:
    """Return whether each reply to an exam is right; what is left out becomes a gap of the run."""
    step, model_step = lookup(run.exam, "step", int), lookup(run.summary, "exported step", int)
    if step not in (None, model_step):
        run.gaps.append(f"exam.json is of step {step}, the model of step {model_step}")
        return {}
    families: dict[str, list[bool]] = {}
    for reply in lookup(run.exam, "replies", list) or []:
        if isinstance(reply, dict):
            families.setdefault(str(reply.get("family")), []).append(bool(reply.get("right")))
    for family in lookup(run.exam, "demo_families", list) or []:
        if families.pop(str(family), None):
            run.gaps.append(f"{family} is an exam of the demo, and the run has other data")
    return families


def read_scores(files: Sequence[str | Path]) -> dict[str, Results]:
    """Read what `minigpt evaluate --json` wrote, the models of all files side by side.

    Raises:
        ConfigError: for a file that holds something else.
    """
    results: dict[str, Results] = {}
    remedy = "Give a file that `minigpt evaluate --json FILE` wrote."
    for file in files:
        with refusing(str(file), ConfigError, remedy, verb="holds no scores"):
            for model, tests in read_json(Path(file))["models"].items():
                for test, scores in tests.items():
                    results.setdefault(model, {})[test] = {
                        name: Score(**_require_numbers(score)) for name, score in scores.items()
                    }
    return results


def _require_numbers(score: dict[str, Any]) -> dict[str, Any]:
    if not all(map(is_number, score.values())):
        raise ValueError("a score is no number")
    return score


def add_scores(document: Document, results: Mapping[str, Results]) -> None:
    """Add a table for each test, one column for each model, and its main share as bars."""
    for test, body in tables(results).items():
        document.heading(test)
        document.table(("", *results, "chance", "items"), body)
        for name, *_ in body:
            of_test = {model: tests.get(test, {}) for model, tests in results.items()}
            scores = {model: values[name] for model, values in of_test.items() if name in values}
            if all(score.high is not None for score in scores.values()):
                document.figures([bars(f"{test}: {name}", scores)])
                break
    if results:
        document.note("Shares with their 95% interval (Wilson).")


def _samples(document: Document, runs: Sequence[Run]) -> None:
    """Add the replies to fixed prompts: the last ones open, all of them at a click."""
    sampled = [run for run in runs if run.samples]
    if sampled:
        document.heading("Samples")
    for run in sampled:
        last = run.samples[-1][0]
        rows = [(run.name, prompt, reply) for step, prompt, reply in run.samples if step == last]
        document.table(("run", "prompt", f"reply at step {last}"), rows)
        samples = [(str(step), prompt, reply) for step, prompt, reply in run.samples]
        document.folded_table(f"{run.name}: over time", ("step", "prompt", "reply"), samples)


def _data(document: Document, runs: Sequence[Run]) -> None:
    """Add each data file's counts, and how long its samples are."""
    rows, figures = [], []
    for run in runs:
        for split in ("train", "val"):
            recorded = lookup(run.summary, f"data {split}", list) or []
            configured = {"file": _files(lookup(run.config, f"data init_args {split}"))}
            for file in [file for file in recorded if isinstance(file, dict)] or [configured]:
                counts = [file.get(name) for name in COUNTS]
                over = _share_over(file)
                rows.append((run.name, split, file.get("file"), *counts, over))
                lengths = [b for b in lookup(file, "lengths", list) or [] if _is_bar(b)]
                if lengths:
                    title = f"{run.name} {split}: samples by tokens ({over} of rows were longer)"
                    figures.append(bar_chart(title, lengths))
    document.heading("Data")
    document.table(("run", "split", "file", *COUNTS, "over max_length"), rows)
    document.figures(figures)


def _share_over(file: dict[str, Any]) -> str | None:
    """Return the share of a data file's rows that were longer than `max_length`."""
    cut, total = file.get("cut"), file.get("rows")
    return f"{cut / total:.1%}" if is_number(cut) and is_number(total) and total else None


def _is_bar(value: object) -> bool:
    """Whether a value of a JSON file is a label with a number."""
    return isinstance(value, list) and len(value) == 2 and is_number(value[1])


def _files(option: object) -> str | None:
    """Write the files of a config: one, a list, or a mapping to weights."""
    if isinstance(option, list | dict):
        return ", ".join(map(str, option))
    return None if option is None else str(option)


def _provenance(document: Document, runs: Sequence[Run]) -> None:
    """Add hardware, versions and configs, and say what could not be read."""
    document.heading("Hardware and versions")
    machines = {run.name: lookup(run.summary, "machine", dict) or {} for run in runs}
    keys = list(dict.fromkeys(key for machine in machines.values() for key in machine))
    if keys:
        rows = [(name, *(str(m.get(k, "–")) for k in keys)) for name, m in machines.items()]
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
