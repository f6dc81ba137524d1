"""`minigpt completion`: a script by which a shell completes verbs, options and their choices.

It is written once and holds all words, since each Tab would otherwise wait for torch's import.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import Any

from minigpt.cli.options import CommandParser
from minigpt.cli.schema import config_schema, forms_of
from minigpt.cli.verbs import COMMANDS, TRAINER_VERBS
from minigpt.errors import ConfigError

EXAMPLES = """examples:
  minigpt completion bash > ~/.local/share/bash-completion/completions/minigpt
  minigpt completion zsh > "${fpath[1]}/_minigpt"
  minigpt completion fish > ~/.config/fish/completions/minigpt.fish

New shells complete then. Written again, it knows the options of a newer MiniGPT.
"""
SHELLS = ("bash", "zsh", "fish")


def main(arguments: list[str]) -> None:
    """Print the script."""
    print(shell_script(parser().parse_args(arguments).shell))


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(
        prog="minigpt completion",
        description="Print a script by which a shell completes minigpt's verbs and options.",
        epilog=EXAMPLES,
    )
    top.add_argument("shell", choices=SHELLS, help="the shell to write for")
    return top


def shell_script(shell: str) -> str:
    """Return the script for one of `SHELLS`.

    Raises:
        ConfigError: when shtab, which writes it, is missing.
    """
    try:
        import shtab
    except ImportError as error:
        raise ConfigError("shtab is missing: pip install 'minigpt[completion]'") from error
    script: str = shtab.complete(parser_of_all_verbs(), shell)
    return script


def parser_of_all_verbs() -> argparse.ArgumentParser:
    """Return one parser of all verbs, which describes them and reads nothing."""
    top = argparse.ArgumentParser("minigpt")
    verbs = top.add_subparsers(dest="verb")
    options = list(options_of(config_schema()))
    for verb, text in TRAINER_VERBS.items():
        add = verbs.add_parser(verb, help=text).add_argument
        add("--config", help="a config, or an overlay of one before it")
        for name, schema in options:
            help_text = schema.get("description", "").replace("%", "%%")
            add(f"--{name}", choices=choices_of(schema), help=help_text)
    for verb, text in COMMANDS.items():
        verbs.add_parser(verb, help=text)
        verbs.choices[verb] = importlib.import_module(f"minigpt.cli.{verb}").parser()
    return top


def options_of(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each option of a JSON Schema by its dotted name, such as model.init_args.optimizer.lr.

    Args:
        schema: as `config_schema` returns it.
    """

    def walk(part: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for form in forms_of(part):
            if "$ref" in form:
                form = schema["$defs"][form["$ref"].rpartition("/")[2]]
            for name, option in form.get("properties", {}).items():
                nested = list(walk(option, f"{prefix}{name}."))
                if not name.startswith("$"):
                    yield from nested or [(f"{prefix}{name}", option)]

    yield from dict(walk(schema, "")).items()  # the forms of a class share names


def choices_of(schema: dict[str, Any]) -> list[str] | None:
    """Return the words that an option takes; None where it takes others."""
    choices: list[str] = []
    for form in forms_of(schema):
        if form.get("type") == "boolean":
            choices += ["true", "false"]
        elif form.get("type") == "null":
            choices.append("null")
        elif "enum" in form:
            choices += map(str, form["enum"])
        else:
            return None
    return choices
