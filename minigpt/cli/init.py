"""`minigpt init`: configs, recipes and sample data in a folder, to begin without a clone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from minigpt.cli.options import CommandParser, writing
from minigpt.data.bundled import FETCHED, FOLDERS, starter
from minigpt.errors import ConfigError
from minigpt.files import atomic_directory

NEXT = """\
  minigpt tokenizer train --data_file data/pretrain.jsonl --output_dir outputs/tokenizer \\
    --vocab_size 2048
  minigpt fit --config configs/pretrain.yaml
  minigpt fit --config configs/sft.yaml
  minigpt chat --model outputs/sft
"""
EXAMPLES = "examples:\n  minigpt init demo && cd demo\n" + NEXT


def main(arguments: list[str]) -> None:
    """Parse the command line and copy the folders."""
    directory: Path = parser().parse_args(arguments).directory
    source = starter()
    for name in FOLDERS:
        if (directory / name).exists():
            raise ConfigError(f"{directory / name} exists and is left alone. Name another folder.")
    with ExitStack() as stack:  # so that both folders appear, or none
        for name in FOLDERS:
            stack.enter_context(writing(directory / name))
            copy(source / name, stack.enter_context(atomic_directory(directory / name)))
    print(f"{directory}/configs and {directory}/data are written. The demo:")
    print(f"  cd {directory}\n{NEXT}", end="")
    print("For your own data, begin with configs/recipes/hub_lora.yaml; its header says how.")


def copy(folder: Path, target: Path) -> None:
    """Copy a folder's files into one that is there; what was fetched into a clone is left out."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if FETCHED not in relative.parts and path.is_file():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            (target / relative).write_bytes(path.read_bytes())


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(
        prog="minigpt init",
        description="Write the demo's configs and data, and the recipes, into a folder.",
        epilog=EXAMPLES,
    )
    top.add_argument("directory", type=Path, help="made if it does not exist")
    return top
