"""`minigpt report`: a page about one or several runs."""

from __future__ import annotations

from pathlib import Path

from minigpt.cli.options import CommandParser, check_distinct, writing
from minigpt.errors import ConfigError
from minigpt.terminal import printable

EXAMPLES = """examples:
  minigpt report outputs/pretrain
  minigpt report outputs/sft outputs/sft-2 --output compared.html
  minigpt report outputs/sft --results scores.json
"""


def main(arguments: list[str]) -> None:
    """Parse the command line and write the page."""
    args = parser().parse_args(arguments)
    from minigpt.report.build import write_report
    from minigpt.report.runs import run_directory

    output = Path(args.output or run_directory(args.runs[0]) / "report.html")
    if output.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output must end in .html, but is {output}.")
    for file in (output, output.with_suffix(".md")):
        check_distinct("--output", file, args.results)
    check_markdown(output.with_suffix(".md"))
    with writing(output):
        beginning = write_report(args.runs, output, args.results)
    print(printable(beginning))
    print(f"written to {output} and {output.with_suffix('.md').name}")


def check_markdown(markdown: Path) -> None:
    """Refuse to replace a file beside the page, which nobody named, that is no report.

    Raises:
        ConfigError: for such a file.
    """
    if markdown.is_file():
        with markdown.open("rb") as file:
            if file.readline(100).strip() in (b"", b"# MiniGPT report"):
                return
        raise ConfigError(
            f"{markdown} is no report, and would be replaced: the Markdown goes beside the page. "
            "Give --output another name."
        )


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(
        prog="minigpt report",
        description="Write a page (and Markdown beside it): curves, samples, exams, data, cost.",
        epilog=EXAMPLES,
    )
    top.add_argument("runs", nargs="+", help="run directories")
    top.add_argument("--output", help="the page; by default report.html in the first directory")
    top.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="scores to show as well, as evaluate --json wrote them",
    )
    return top
