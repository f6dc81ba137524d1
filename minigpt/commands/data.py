"""`minigpt data`: check, measure, look at and fetch data files."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from minigpt.commands.options import CommandParser, positive
from minigpt.errors import ConfigError, DataError

EXAMPLES = """examples:
  minigpt data check data/sft.jsonl --val data/sft_val.jsonl --exam data/exam/skills.jsonl
  minigpt data check raw.jsonl --fix clean.jsonl
  minigpt data stats data/*.jsonl --tokenizer outputs/tokenizer --html stats.html
  minigpt data show data/dpo.jsonl --tokenizer outputs/tokenizer
  minigpt data fetch tinystories-val --output_dir data/public
"""


def main(args: list[str]) -> None:
    """Parse the command line and do what is asked."""
    parser = CommandParser(
        prog="minigpt data", description="Work on data before training.", epilog=EXAMPLES
    )
    actions = parser.add_subparsers(dest="action", required=True)
    check = actions.add_parser(
        "check", help="find problems; exit 2 when there are errors", epilog=EXAMPLES
    )
    stats = actions.add_parser(
        "stats", help="lengths, turns, languages, repetition", epilog=EXAMPLES
    )
    show = actions.add_parser(
        "show", help="what the model is trained on, coloured", epilog=EXAMPLES
    )
    for action in (check, stats):
        action.add_argument("files", nargs="+", help="JSONL, JSON arrays, plain or gzipped")
        action.add_argument("--json", help="write the result to a JSON file, too")
        action.add_argument("--tokenizer", help="tokenizer or model directory, or hub id")
    show.add_argument("file", help="JSONL, a JSON array, plain or gzipped")
    show.add_argument("--tokenizer", required=True, help="tokenizer or model directory, or hub id")
    for action in (check, stats, show):
        action.add_argument("--kind", choices=("text", "chat", "preference"), help="of the rows")
        action.add_argument("--max_length", type=positive, default=512, help="tokens (512)")
    for action in (stats, show):
        action.add_argument("--html", help="write a page to this file, too")
    check.add_argument("--val", nargs="+", default=[], help="validation files: must not overlap")
    check.add_argument("--exam", nargs="+", default=[], help="exam files: must not leak")
    check.add_argument("--near", type=share, nargs="?", const=0.8, help="near duplicates (0.8)")
    check.add_argument("--fix", help="write the good rows of one file here, mended")
    check.add_argument("--all", action="store_true", help="print every problem, not 20 of each")
    stats.add_argument("--sample", type=positive, default=2000, help="rows tokenised (2000)")
    stats.add_argument("--all", action="store_true", help="tokenise all rows")
    stats.add_argument("--tokens_per_batch", type=positive, default=8192, help="to pack (8192)")
    show.add_argument("--start", type=positive, default=1, help="first line to show (1)")
    show.add_argument("--rows", type=positive, default=3, help="rows to show (3)")
    fetch = actions.add_parser("fetch", help="public corpora as JSONL", epilog=EXAMPLES)
    fetch.add_argument("name", nargs="?", help="which one; without it, all are listed")
    fetch.add_argument("--output_dir", default="data/public", help="where to put it (data/public)")
    fetch.add_argument("--source", choices=("hub", "modelscope"), default="hub")
    fetch.add_argument("--limit", type=positive, help="rows to keep")
    fetch.add_argument("--file", nargs="+", default=[], help="other files of its repository")
    chosen = parser.parse_args(args)
    {"check": run_check, "stats": run_stats, "show": run_show, "fetch": run_fetch}[chosen.action](
        chosen
    )


def share(text: str) -> float:
    """Read a similarity above 0 and up to 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, but is {text!r}")
    return value


def run_check(chosen: argparse.Namespace) -> None:
    """Print the problems of files, and write a mended copy if asked to.

    Raises:
        DataError: when there are errors, not only hints.
    """
    from minigpt.corpus.check import HINTS, Checker, Findings, Options

    files, fix = [Path(file) for file in chosen.files], chosen.fix and Path(chosen.fix)
    if fix and (len(files) > 1 or fix.exists()):
        raise ConfigError("--fix mends one file at a time and writes to a new one.")
    findings = Findings(limit=10**9 if chosen.all else 20)
    options = Options(
        *(chosen.kind, tuple(chosen.val), tuple(chosen.exam), tokenizer_of(chosen)),
        *(chosen.max_length, chosen.near),
    )
    with tempfile.TemporaryDirectory(prefix="minigpt-check-") as scratch:
        checker = Checker(options, findings, Path(scratch))
        for file in dict.fromkeys(files):
            checker.check(file)
        checker.finish()
        print(*findings.lines(), sep="\n", end="\n" if findings.counts else "")
        for reason, count in findings.counts.most_common():
            print(f"{count:>9,} {'hint ' if reason in HINTS else 'error'} {reason}")
        print(f"{checker.rows:,} rows checked: {findings.errors():,} errors, ", end="")
        print(f"{findings.counts.total() - findings.errors():,} hints")
        if fix:
            written = checker.write_fixed(files[0], fix)
            print(f"{fix}: {written:,} rows, {checker.rows - written:,} left out")
    if chosen.json:
        counts = {"rows": checker.rows, "counts": findings.counts, "errors": findings.errors()}
        problems = [
            {"file": str(e.path), "line": e.line, "field": e.field, "reason": e.reason}
            | {"problem": e.problem, "remedy": e.remedy}
            for e in findings.kept
        ]
        save(chosen.json, counts | {"problems": problems})
    if findings.errors():
        raise DataError(f"{findings.errors():,} errors in {', '.join(chosen.files)}; see above")


def run_stats(chosen: argparse.Namespace) -> None:
    """Print the measures of files, and write them as JSON and HTML if asked to."""
    from minigpt.corpus import stats
    from minigpt.report.page import page

    tokenizer = tokenizer_of(chosen)
    reports = []
    for file in chosen.files:
        reports.append(
            stats.measure(
                *(Path(file), chosen.kind, tokenizer, chosen.max_length, chosen.tokens_per_batch),
                None if chosen.all else chosen.sample,
            )
        )
        print(stats.terminal(reports[-1]), end="\n\n")
    if chosen.json:
        save(chosen.json, {"files": reports})
    if chosen.html:
        save(chosen.html, page("Data", "\n".join(map(stats.section, reports))))


def run_show(chosen: argparse.Namespace) -> None:
    """Print rows as training sees them, and write them as HTML if asked to."""
    from rich.console import Console

    from minigpt.corpus import show
    from minigpt.report.page import page

    parts = []
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for part in show.segments(
        *(Path(chosen.file), tokenizer_of(chosen), chosen.kind, chosen.max_length),
        *(chosen.start, chosen.rows),
    ):
        parts.append(part)
        console.rule(show.heading(part), align="left")
        console.print(show.coloured(part) if console.color_system else show.plain(part))
    if not parts:
        raise ConfigError(f"{chosen.file} has no row from line {chosen.start} on.")
    if chosen.html:
        save(chosen.html, page(f"What is learnt from {chosen.file}", show.html(parts)))


def run_fetch(chosen: argparse.Namespace) -> None:
    """List the corpora, or fetch one after showing its licence."""
    from minigpt.corpus import fetch

    if chosen.name is None:
        for name, corpus in fetch.CORPORA.items():
            print(f"{name:18} {corpus.kind:10} {corpus.about}\n{'':29} {corpus.home.licence}")
        return
    if chosen.name not in fetch.CORPORA:
        raise ConfigError(f"No corpus {chosen.name!r}. Known are {', '.join(fetch.CORPORA)}.")
    corpus = fetch.CORPORA[chosen.name]
    print(
        f"{chosen.name}: {corpus.about}\nlicence: {corpus.home.licence}\npage: {corpus.home.page}"
    )
    out, rows, skipped = fetch.fetch(
        *(chosen.name, Path(chosen.output_dir), chosen.source == "modelscope", chosen.limit),
        tuple(chosen.file),
    )
    left = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    print(f"{out}: {rows:,} rows" + (f"; left out: {left}" if left else ""))


def tokenizer_of(chosen: argparse.Namespace) -> Any:
    """Load the tokenizer that was named, with a chat template."""
    from minigpt.data import chat, tokenizer

    if chosen.tokenizer is None:
        return None
    loaded = tokenizer.load(chosen.tokenizer)
    chat.install_template(loaded)
    return loaded


def save(file: str, content: object) -> None:
    """Write a page, or another value as JSON, whole or not at all.

    Raises:
        ConfigError: when the file cannot be written.
    """
    from minigpt.files import write_json, write_text

    try:
        if isinstance(content, str):
            write_text(Path(file), content)
        else:
            write_json(Path(file), content)
    except OSError as error:
        raise ConfigError(f"Cannot write {file}: {error.strerror}. Choose another file.") from error
