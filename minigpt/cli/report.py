"""`minigpt report`: a page about one or several runs."""

from __future__ import annotations

from pathlib import Path

from minigpt.cli.options import CommandParser, writing
from minigpt.errors import ConfigError

EXAMPLES = """examples:
  minigpt report outputs/pretrain
  minigpt report outputs/sft outputs/sft-2 --output compared.html
  minigpt report outputs/pipeline
  minigpt report outputs/sft --results scores.json
"""


def main(args: list[str]) -> None:
    """Parse the command line and write the page."""
    parser = CommandParser(
        prog="minigpt report",
        description="Write a page (and Markdown beside it): curves, samples, exams, data, cost.",
        epilog=EXAMPLES,
    )
    parser.add_argument("runs", nargs="+", help="run directories; outputs/pipeline for all stages")
    parser.add_argument("--output", help="the page; by default report.html in the first directory")
    told = "scores to show as well, as evaluate --json wrote them"
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE", help=told)
    chosen = parser.parse_args(args)
    from minigpt.report.build import write_report

    output = Path(chosen.output or Path(chosen.runs[0]) / "report.html")
    if output.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output must end in .html, but is {output}.")
    with writing(output):
        first = write_report(chosen.runs, output, chosen.results)
    print(first)
    print(f"written to {output} and {output.with_suffix('.md').name}")
