"""`minigpt data`: check, measure, look at and fetch data files."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from minigpt.cli.options import CommandParser, positive, writing
from minigpt.errors import ConfigError, DataError
from minigpt.files import write_json, write_text
from minigpt.progress import shown

EXAMPLES = """examples:
  minigpt data check data/sft.jsonl --val data/sft_val.jsonl --exam data/exam/skills.jsonl
  minigpt data check raw.jsonl --fix clean.jsonl
  minigpt data stats data/*.jsonl --tokenizer outputs/tokenizer --html stats.html
  minigpt data show data/dpo.jsonl --tokenizer outputs/tokenizer
  minigpt data fetch tinystories-val --output_dir data/public
"""


def main(args: list[str]) -> None:
    """Parse the command line and do what is asked."""
    chosen = parser().parse_args(args)
    chosen.run(chosen)


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(
        prog="minigpt data", description="Work on data before training.", epilog=EXAMPLES
    )
    actions = top.add_subparsers(dest="action", required=True)

    def verb(run: Any, text: str, reads: bool = True) -> argparse.ArgumentParser:
        added = actions.add_parser(run.__name__, help=text, epilog=EXAMPLES)
        added.set_defaults(run=run)
        if reads:
            added.add_argument("files", nargs="+", help="JSONL or JSON arrays, plain or gzipped")
            added.add_argument("--kind", choices=("text", "chat", "preference"), help="of the rows")
            added.add_argument("--tokenizer", help="tokenizer or model directory, or hub id")
            added.add_argument("--max_length", type=positive, default=512, help="tokens (512)")
        return added

    add = verb(check, "find problems; exit status 2 when there are errors").add_argument
    add("--val", nargs="+", default=[], help="validation files, which must not overlap")
    add("--exam", nargs="+", default=[], help="exam files, which must not leak")
    add("--near", type=share, nargs="?", const=0.8, help="near duplicates (similarity 0.8)")
    add("--fix", help="write the good rows of one file here, mended")
    add("--all", action="store_true", help="print every problem, not 20 of each")
    add("--json", help="write the result to this file, too")
    add = verb(stats, "lengths, turns, languages, repetition").add_argument
    add("--sample", type=positive, default=2000, help="rows whose tokens are counted (2000)")
    add("--all", action="store_true", help="count the tokens of all rows")
    add("--tokens_per_batch", type=positive, default=8192, help="of a packed batch (8192)")
    add("--json", help="write the result to this file, too")
    add("--html", help="write a page with plots to this file, too")
    add = verb(show, "what the model is trained on, coloured").add_argument
    add("--start", type=positive, default=1, help="first line to show (1)")
    add("--rows", type=positive, default=3, help="rows to show of each file (3)")
    add("--html", help="write a page to this file, too")
    add = verb(fetch, "public corpora as JSONL", reads=False).add_argument
    add("name", nargs="?", help="which one; without it, all are listed")
    add("--output_dir", default="data/public", help="where to put it (data/public)")
    add("--source", choices=("hub", "modelscope"), default="hub", help="where from (hub)")
    add("--limit", type=positive, help="rows to keep")
    add("--file", nargs="+", default=[], help="other files of its repository")
    return top


def share(text: str) -> float:
    """Read a similarity above 0 and up to 1."""
    value = float(text) if text.replace(".", "", 1).isdecimal() else 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, but is {text!r}")
    return value


def check(chosen: argparse.Namespace) -> None:
    """Print the problems of files, and write a mended copy if asked to.

    Raises:
        DataError: when there are errors, not only hints.
    """
    from minigpt.datatools.check import Checker, Findings

    files, fix = list(dict.fromkeys(map(Path, chosen.files))), chosen.fix and Path(chosen.fix)
    if fix and (len(files) > 1 or fix.exists()):
        raise ConfigError("--fix mends one file at a time and writes to a new one.")
    findings = Findings(limit=10**9 if chosen.all else 20)
    options = (chosen.kind, chosen.val, chosen.exam, tokenizer_of(chosen))
    with tempfile.TemporaryDirectory(prefix="minigpt-check-") as scratch:
        with shown("reading what must not leak"):
            checker = Checker(findings, Path(scratch), *options, chosen.max_length, chosen.near)
        for file in files:
            with shown(f"checking {file}"):
                checker.check(file)
        with shown("comparing rows"):
            checker.finish()
        print(*findings.lines(), sep="\n", end="\n" if findings.counts else "")
        hints = findings.counts.total() - findings.errors()
        found = f"{counted(findings.errors(), 'error')}, {counted(hints, 'hint')}"
        print(f"{counted(checker.rows, 'row')} checked: {found}")
        if fix:
            with writing(fix), shown(f"writing {fix}"):
                written = checker.write_fixed(files[0], fix)
            print(f"{fix}: {counted(written, 'row')}, {checker.rows - written:,} left out")
    if chosen.json:
        with writing(chosen.json):
            write_json(Path(chosen.json), {"rows": checker.rows, **findings.as_dict()})
    if findings.errors():
        told = f"{counted(findings.errors(), 'error')} in {', '.join(chosen.files)}; see above"
        raise DataError(told)


def stats(chosen: argparse.Namespace) -> None:
    """Print the measures of files, and write them as JSON and HTML if asked to."""
    from minigpt.datatools.stats import measure, section, terminal
    from minigpt.page import page

    tokenizer = tokenizer_of(chosen)
    options = (chosen.kind, tokenizer, chosen.max_length, chosen.tokens_per_batch)
    reports = []
    for file in chosen.files:
        with shown(f"measuring {file}"):
            reports.append(measure(Path(file), *options, None if chosen.all else chosen.sample))
        print(terminal(reports[-1]), end="\n\n")
    if chosen.json:
        with writing(chosen.json):
            write_json(Path(chosen.json), {"files": reports})
    if chosen.html:
        with writing(chosen.html):
            write_text(Path(chosen.html), page("Data", "\n".join(map(section, reports))))


def show(chosen: argparse.Namespace) -> None:
    """Print rows as training sees them, and write them as HTML if asked to."""
    from rich.console import Console

    from minigpt.datatools import show
    from minigpt.page import page

    if not chosen.tokenizer:
        raise ConfigError("Tokens need --tokenizer: a tokenizer or model directory, or hub id.")
    console, parts = Console(soft_wrap=True, highlight=False, markup=False), []
    options = (tokenizer_of(chosen), chosen.kind, chosen.max_length, chosen.start, chosen.rows)
    for file in chosen.files:
        for part in show.segments(Path(file), *options):
            parts.append(part)
            console.print(f"── {part.heading}", style="bold")
            console.print(show.coloured(part) if console.color_system else show.plain(part))
    if not parts:
        raise ConfigError(f"There is no row from line {chosen.start} on.")
    if chosen.html:
        with writing(chosen.html):
            write_text(Path(chosen.html), page("What is learnt", show.html(parts)))


def fetch(chosen: argparse.Namespace) -> None:
    """List the corpora, or fetch one after showing its licence."""
    from minigpt.datatools.fetch import CORPORA, fetch

    if chosen.name is None:
        for name, corpus in CORPORA.items():
            print(f"{name:18} {corpus.kind:10} {corpus.about}\n{'':29} {corpus.home.licence}")
        return
    if chosen.name not in CORPORA:
        raise ConfigError(f"No corpus {chosen.name!r}. Known are {', '.join(CORPORA)}.")
    corpus, home = CORPORA[chosen.name], CORPORA[chosen.name].home
    print(f"{chosen.name}: {corpus.about}\nlicence: {home.licence}\npage: {home.page}")
    options = (chosen.source == "modelscope", chosen.limit, tuple(chosen.file))
    with writing(chosen.output_dir):
        out, rows, skipped = fetch(chosen.name, Path(chosen.output_dir), *options)
    left = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    print(f"{out}: {counted(rows, 'row')}" + (f"; left out: {left}" if left else ""))


def counted(count: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def tokenizer_of(chosen: argparse.Namespace) -> Any:
    """Load the tokenizer that was named, with a chat template; None if there was none."""
    from minigpt.data import chat, tokenizer

    if chosen.tokenizer is None:
        return None
    loaded = tokenizer.load(chosen.tokenizer)
    chat.install_template(loaded)
    return loaded
