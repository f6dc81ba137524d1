"""`minigpt data`: check, measure, look at, convert and fetch data files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.cli.options import CommandParser, add_columns, check_distinct, positive, writing
from minigpt.data.formats import expand_files
from minigpt.errors import ConfigError, DataError
from minigpt.files import write_json, write_text
from minigpt.progress import shown
from minigpt.terminal import counted, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from minigpt.datatools.check import Findings

KINDS = ("text", "chat", "preference", "unpaired")
Run = Callable[[argparse.Namespace], None]
EXAMPLES = """examples:
  minigpt data check data/sft.jsonl --val data/sft_val.jsonl --exam data/exam/skills.jsonl
  minigpt data check raw.jsonl --fix clean.jsonl
  minigpt data stats data/*.jsonl --tokenizer outputs/tokenizer --html stats.html
  minigpt data show data/dpo.jsonl --tokenizer outputs/tokenizer
  minigpt data convert qa.xlsx extra.parquet sft.jsonl --columns ask=prompt reply=completion
  minigpt data fetch tinystories-val --output_dir data/public
"""


def main(argv: list[str]) -> None:
    """Parse the command line and do what is asked."""
    args = parser().parse_args(argv)
    args.run(args)


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(
        prog="minigpt data", description="Work on data before training.", epilog=EXAMPLES
    )
    actions = top.add_subparsers(dest="action", required=True)

    def verb(name: str, run: Run, text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=text, epilog=EXAMPLES)
        action.set_defaults(run=run)
        return action

    def reader(name: str, run: Run, text: str) -> argparse.ArgumentParser:
        action = verb(name, run, text)
        add = action.add_argument
        forms = "JSONL, JSON arrays, text, CSV, TSV (also compressed), .xlsx, Parquet, Arrow"
        add("files", nargs="+", help=f"{forms}; folders")
        kinds = (*KINDS, "prompt") if name == "check" else KINDS
        add("--kind", choices=kinds, help="of the rows")
        add("--tokenizer", help="tokenizer, model or run directory, or hub id")
        template = (
            "file of a template, or name of one of the tokenizer's; by default as in training"
        )
        add("--chat_template", help=template)
        add("--max_length", type=positive, default=512, help="tokens (512)")
        add_columns(action)
        return action

    add = reader("check", check, "find problems; exit status 2 when there are errors").add_argument
    add("--val", nargs="+", default=[], help="validation files, which must not overlap")
    add("--exam", nargs="+", default=[], help="exam files, which must not leak")
    add("--near", type=share, nargs="?", const=0.8, help="near duplicates (similarity 0.8)")
    add("--fix", help="write the good rows of one file here, mended")
    add("--all", action="store_true", help="print every problem, not 20 of each")
    add("--json", help="write the result to this file, too")
    add = reader("stats", stats, "lengths, turns, languages, repetition").add_argument
    add("--sample", type=positive, default=2000, help="rows whose tokens are counted (2000)")
    add("--all", action="store_true", help="count the tokens of all rows")
    add("--tokens_per_batch", type=positive, default=8192, help="of a packed batch (8192)")
    add("--json", help="write the result to this file, too")
    add("--html", help="write a page with plots to this file, too")
    add = reader("show", show, "what the model is trained on, coloured").add_argument
    add("--start", type=positive, default=1, help="first line to show (1)")
    add("--rows", type=positive, default=3, help="rows to show of each file (3)")
    add("--html", help="write a page to this file, too")
    action = verb("convert", convert, "files of any form as one JSONL file")
    add_columns(action)
    add = action.add_argument
    add("files", nargs="+", help="what to read")
    add("output", help="the JSONL to write, which must not exist")
    add = verb("fetch", fetch, "public corpora as JSONL").add_argument
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


def check(args: argparse.Namespace) -> None:
    """Print the problems of files, and write a mended copy if asked to.

    Raises:
        DataError: when there are errors, not only hints.
    """
    from minigpt.datatools.check import Checker, Findings

    files = list(map(Path, expand_files(args.files)))
    val, exam = expand_files(args.val), expand_files(args.exam)
    fix = Path(args.fix) if args.fix else None
    if fix and (len(files) > 1 or fix.exists()):
        raise ConfigError("--fix mends one file at a time and writes to a new one.")
    check_distinct("--json", args.json, [*files, *val, *exam])
    findings = Findings(limit=None if args.all else 20)
    tokenizer = tokenizer_of(args)
    with shown("reading validation files and exams"):
        checker = Checker(
            findings,
            args.kind,
            val,
            exam,
            tokenizer,
            args.max_length,
            args.near,
            dict(args.columns),
        )
    for file in files:
        with shown(f"checking {file}"):
            checker.check(file)
    with shown("comparing rows"):
        checker.finish()
    print_findings(findings, checker.rows)
    if fix:
        with writing(fix), shown(f"writing {fix}"):
            written = checker.write_fixed(files[0], fix)
        print(f"{fix}: {counted(written, 'row')}, {checker.rows - written:,} left out")
    if args.json:
        with writing(args.json):
            write_json(Path(args.json), {"rows": checker.rows, **findings.as_dict()})
    if findings.errors():
        errors = counted(findings.errors(), "error")
        raise DataError(f"{errors} in {', '.join(findings.files_with_errors())}; see above")


def print_findings(findings: Findings, rows: int) -> None:
    """Print the problems, and how many there are in so many rows."""
    lines = map(printable, findings.lines())
    print(*lines, sep="\n", end="\n" if findings.counts else "")
    errors = findings.errors()
    hints = findings.counts.total() - errors
    print(f"{counted(rows, 'row')} checked: {counted(errors, 'error')}, {counted(hints, 'hint')}")


def stats(args: argparse.Namespace) -> None:
    """Print the measures of files, and write them as JSON and HTML if asked to."""
    from minigpt.datatools.stats import measure, section, terminal
    from minigpt.page import page

    files = expand_files(args.files)
    check_distinct("--json", args.json, files)
    check_distinct("--html", args.html, files)
    tokenizer = tokenizer_of(args)
    sample = None if args.all else args.sample
    reports = []
    for file in files:
        with shown(f"measuring {file}"):
            report = measure(
                Path(file),
                args.kind,
                tokenizer,
                args.max_length,
                args.tokens_per_batch,
                sample,
                dict(args.columns),
            )
        reports.append(report)
        print(printable(terminal(report)), end="\n\n")
    if args.json:
        with writing(args.json):
            write_json(Path(args.json), {"files": reports})
    if args.html:
        with writing(args.html):
            write_text(Path(args.html), page("Data", "\n".join(map(section, reports))))


def show(args: argparse.Namespace) -> None:
    """Print rows as training sees them, and write them as HTML if asked to."""
    from rich.console import Console

    from minigpt.datatools import show
    from minigpt.page import page

    files = expand_files(args.files)
    check_distinct("--html", args.html, files)
    tokenizer = tokenizer_of(args)
    if tokenizer is None:
        raise ConfigError("Tokens need --tokenizer: a tokenizer or model directory, or hub id.")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    segments = []
    for file in files:
        for segment in show.segments(
            Path(file),
            tokenizer,
            args.kind,
            args.max_length,
            args.start,
            args.rows,
            dict(args.columns),
        ):
            segments.append(segment)
            console.print(f"── {printable(segment.heading)}", style="bold")
            console.print(show.coloured(segment) if console.color_system else show.plain(segment))
    if not segments:
        raise ConfigError(f"There is no row from line {args.start} on.")
    if args.html:
        with writing(args.html):
            write_text(Path(args.html), page("What is learnt", show.html(segments)))


def convert(args: argparse.Namespace) -> None:
    """Write files of any form as JSONL."""
    from minigpt.datatools.convert import convert

    out = Path(args.output)
    if out.exists():
        raise ConfigError(f"{out} exists and is left alone. Name a new file.")
    with writing(out), shown(f"writing {out}"):
        rows = convert(list(map(Path, expand_files(args.files))), out, dict(args.columns))
    print(f"{out}: {counted(rows, 'row')}")


def fetch(args: argparse.Namespace) -> None:
    """List the corpora, or fetch one after showing its licence."""
    from minigpt.datatools.fetch import CORPORA, fetch

    if args.name is None:
        for name, corpus in CORPORA.items():
            print(f"{name:18} {corpus.kind:10} {corpus.about}\n{'':29} {corpus.repository.licence}")
        return
    if args.name not in CORPORA:
        raise ConfigError(f"No corpus {args.name!r}. Known are {', '.join(CORPORA)}.")
    corpus = CORPORA[args.name]
    print(f"{args.name}: {corpus.about}")
    print(f"licence: {corpus.repository.licence}\npage: {corpus.repository.page}")
    modelscope = args.source == "modelscope"
    with writing(args.output_dir):
        out, rows, skipped = fetch(
            args.name, Path(args.output_dir), modelscope, args.limit, tuple(args.file)
        )
    left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    print(f"{out}: {counted(rows, 'row')}" + (f"; left out: {left_out}" if left_out else ""))


def tokenizer_of(args: argparse.Namespace) -> PreTrainedTokenizerFast | None:
    """Load the tokenizer that `--tokenizer` names, with a chat template; None without it.

    Raises:
        ConfigError: for a chat template without a tokenizer.
    """
    from minigpt.data import chat, tokenizer

    if args.tokenizer is None:
        if args.chat_template is not None:
            raise ConfigError("--chat_template needs --tokenizer, which encodes what it renders.")
        return None
    loaded = tokenizer.load(args.tokenizer, args.chat_template)
    chat.install_template(loaded)
    return loaded
