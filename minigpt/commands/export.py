"""`minigpt export`: a model for other engines, checked against the run's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minigpt.commands.options import CommandParser
from minigpt.errors import ConfigError

EXAMPLES = """examples:
  minigpt export hf --model outputs/sft --output_dir exports/sft --license apache-2.0
  minigpt export hf --model outputs/lora --output_dir exports/merged
  minigpt export hf --model outputs/lora --output_dir exports/adapter --keep_adapter
  minigpt export gguf --model outputs/sft --output_dir exports/sft-gguf --dtype q8_0
  minigpt export gguf --model outputs/sft --output sft.gguf
"""
DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def main(args: list[str]) -> None:
    """Parse the command line, export and print the numbers of the check."""
    parser = CommandParser(
        prog="minigpt export",
        description="Export a model for other engines and check that it does the same.",
        epilog=EXAMPLES,
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    hf = kinds.add_parser("hf", help="a transformers directory or a peft adapter", epilog=EXAMPLES)
    add_common(hf)
    hf.add_argument("--output_dir", required=True, help="directory to write")
    hf.add_argument("--keep_adapter", action="store_true", help="the adapter alone, not merged")
    hf.add_argument("--base_model_name", help="hub id to write into the adapter as its base")
    gguf = kinds.add_parser("gguf", help="a file for llama.cpp and Ollama", epilog=EXAMPLES)
    add_common(gguf)
    place = gguf.add_mutually_exclusive_group(required=True)
    place.add_argument("--output_dir", help="directory to write: GGUF, Modelfile, model card")
    place.add_argument("--output", help="file to write, ending in .gguf")
    gguf.add_argument("--dtype", choices=DTYPES, default="f16", help="of the matrices (f16)")
    chosen = parser.parse_args(args)
    if chosen.kind == "hf" and chosen.base_model_name and not chosen.keep_adapter:
        parser.error("--base_model_name names the base of an adapter: add --keep_adapter")
    if chosen.kind == "gguf" and chosen.output and not chosen.output.endswith(".gguf"):
        parser.error(f"--output must end in .gguf, but is {chosen.output}")
    for name, value in export(chosen).items():
        print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of both kinds of export."""
    parser.add_argument("--model", required=True, help="run directory, HF directory or hub id")
    parser.add_argument("--adapter", help="LoRA directory to put on the model")
    parser.add_argument("--name", help="of the model (by default the run's)")
    parser.add_argument("--license", help="of the model, such as apache-2.0, for its card")
    parser.add_argument(
        "--results", nargs="+", default=[], help="JSON files of numbers to show in the model card"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", help="write the numbers of the check to this file")


def export(chosen: argparse.Namespace) -> dict[str, Any]:
    """Export; return the numbers of the check.

    Raises:
        ConfigError: when the place is taken or cannot be written to.
    """
    from minigpt.cli import quiet
    from minigpt.export.card import Card
    from minigpt.export.gguf import export_gguf
    from minigpt.export.hf import export_hf
    from minigpt.export.place import check_room, name_of
    from minigpt.files import write_json

    quiet()
    place = Path(chosen.output_dir or chosen.output)
    for source in filter(None, (chosen.model, chosen.adapter)):
        check_room(place, source, chosen.overwrite)
    name = chosen.name or name_of(chosen.adapter or chosen.model)
    card = Card(name, chosen.adapter or chosen.model, chosen.license, chosen.results)
    try:
        if chosen.kind == "gguf":
            numbers = export_gguf(chosen.model, place, card, chosen.dtype, chosen.adapter)
        else:
            adapter = (chosen.adapter, chosen.keep_adapter, chosen.base_model_name)
            numbers = export_hf(chosen.model, place, card, *adapter)
        if chosen.json:
            write_json(Path(chosen.json), numbers)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"Cannot write to {place}: {reason}. Choose another place.") from error
    print(f"exported to {place}")
    return numbers
