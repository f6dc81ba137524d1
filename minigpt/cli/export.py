"""`minigpt export`: a model for other engines, checked against the run's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minigpt.cli.options import CommandParser, add_model, check_output, quiet, run_name, writing
from minigpt.errors import ConfigError
from minigpt.export import DTYPES
from minigpt.files import clear_leftovers, unlisted
from minigpt.terminal import printable

EXAMPLES = """examples:
  minigpt export hf --model outputs/sft --output_dir exports/sft --license apache-2.0
  minigpt export hf --model outputs/lora --output_dir exports/merged
  minigpt export hf --model outputs/lora --output_dir exports/adapter --keep_adapter
  minigpt export gguf --model outputs/sft --output_dir exports/sft-gguf --dtype q8_0
  minigpt export gguf --model outputs/sft --output sft.gguf
"""


def main(arguments: list[str]) -> None:
    """Parse the command line, export and print the numbers of the check."""
    args = parser().parse_args(arguments)
    check_options(args)
    for name, value in export(args).items():
        shown = f"{value:.3g}" if isinstance(value, float) else printable(str(value))
        print(f"{name}: {shown}")


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(
        prog="minigpt export",
        description="Export a model for other engines and check that it does the same.",
        epilog=EXAMPLES,
    )
    kinds = top.add_subparsers(dest="kind", required=True)
    hf = kinds.add_parser("hf", help="a transformers directory or a peft adapter", epilog=EXAMPLES)
    gguf = kinds.add_parser("gguf", help="a file for llama.cpp and Ollama", epilog=EXAMPLES)
    for kind in (hf, gguf):
        add_model(kind)
        kind.add_argument("--name", help="of the model (by default the run's)")
        kind.add_argument("--license", help="of the model, such as apache-2.0")
        kind.add_argument("--results", nargs="+", default=(), help="JSON files for the model card")
        kind.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    hf.add_argument("--output_dir", required=True, help="directory to write")
    hf.add_argument("--keep_adapter", action="store_true", help="the adapter alone, not merged")
    hf.add_argument("--base_model_name", help="hub id of the kept adapter's base")
    output = gguf.add_mutually_exclusive_group(required=True)
    output.add_argument("--output_dir", help="directory for GGUF, Modelfile and model card")
    output.add_argument("--output", help="file to write, ending in .gguf")
    gguf.add_argument("--dtype", choices=DTYPES, default="f16", help="of the matrices (f16)")
    gguf.add_argument(
        "--accept_differences",
        action="store_true",
        help="keep a file by which llama.cpp gives other results, and say so in the model card",
    )
    return top


def check_options(args: argparse.Namespace) -> None:
    """Raise a ConfigError for options that do not go together."""
    mistake = ""
    if args.kind == "hf" and args.base_model_name and not args.keep_adapter:
        mistake = "--base_model_name goes with --keep_adapter"
    if args.output_dir is None:
        if not args.output.endswith(".gguf"):
            mistake = "--output names a file ending in .gguf, --output_dir a directory"
        for option in ("results", "accept_differences"):
            if getattr(args, option):
                mistake = f"--{option} goes with --output_dir, which has a model card"
    if mistake:
        raise ConfigError(f"{mistake}. See: minigpt export {args.kind} --help")


def check_free(output: Path, overwrite: bool) -> None:
    """Refuse an output path with anything but an export as it was written.

    Raises:
        ConfigError: for it, and for such an export without `overwrite`.
    """
    others = unlisted(output) if output.is_dir() else []
    if output.is_file() and output.suffix != ".gguf":
        others = [output.name]
    check_output(output, "an export", others, overwrite)


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Export; return the numbers of the check.

    Raises:
        ConfigError: when the output exists already or cannot be written to, or another process
            exports to it.
    """
    output = Path(args.output_dir or args.output)
    source = Path(args.adapter or args.model)
    for model in filter(None, (args.model, args.adapter)):
        if output.resolve() in (Path(model).resolve(), Path(model, "hf").resolve()):
            raise ConfigError(f"{output} holds the model itself. Export it to another directory.")
    clear_leftovers(output.parent)  # may put back an export that a killed process had moved aside
    check_free(output, args.overwrite)
    from minigpt.export.card import Card
    from minigpt.export.gguf import export_gguf
    from minigpt.export.hf import export_hf
    from minigpt.progress import shown

    quiet()
    card = Card(args.name or run_name(source), str(source), args.license, args.results)
    check_free(output, args.overwrite)  # loading libraries took some time
    with writing(output), shown(f"exporting {args.model}"):
        if args.kind == "gguf":
            numbers = export_gguf(
                args.model, output, card, args.dtype, args.adapter, args.accept_differences
            )
        else:
            numbers = export_hf(
                args.model, output, card, args.adapter, args.keep_adapter, args.base_model_name
            )
    print(f"exported to {output}")
    return numbers
