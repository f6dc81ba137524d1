"""`minigpt schema`: a JSON Schema of the configs, by which editors complete and check them."""

from __future__ import annotations

import json
import sys
from typing import Any

from minigpt.cli.options import CommandParser

EXAMPLES = """examples:
  minigpt schema > minigpt.schema.json

Then a config whose first line is
  # yaml-language-server: $schema=minigpt.schema.json
is completed and checked by editors with YAML's language server.
"""
TEXTS = ("default", "description")  # what a schema has for readers
# Options of the Trainer that take objects of any class.
OPEN = ("callbacks", "logger", "plugins", "profiler", "strategy")


def main(arguments: list[str]) -> None:
    """Print the schema."""
    parser().parse_args(arguments)
    json.dump(config_schema(), sys.stdout, indent=1)
    print()


def parser() -> CommandParser:
    """Describe the command line."""
    return CommandParser(
        prog="minigpt schema",
        description="Print a JSON Schema of the configs of fit, validate, test and predict.",
        epilog=EXAMPLES,
    )


def config_schema() -> dict[str, Any]:
    """Return the schema: an unknown option is a mistake, but for classes that are not MiniGPT's."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Trainer

    from minigpt.cli.trainer import add_run_options
    from minigpt.data.datamodule import JSONLDataModule
    from minigpt.stages.base import BaseModule

    parser = ArgumentParser()
    add_run_options(parser)
    parser.add_argument("--seed_everything", type=bool | int, default=42, help="Of all generators.")
    parser.add_argument("--ckpt_path", type=str | None, help="A checkpoint, or auto.")
    parser.add_subclass_arguments(BaseModule, "model")
    parser.add_subclass_arguments(JSONLDataModule, "data")
    # LightningCLI's own parser has no schema: jsonargparse stumbles over the types of `OPEN`.
    parser.add_class_arguments(Trainer, "trainer", skip=set(OPEN))
    schema: dict[str, Any] = json.loads(parser.get_completion_script("jsonschema"))
    options = schema["properties"]
    options["model"] = _any_class(schema["$defs"].pop("BaseModule")["anyOf"])
    options["data"] = _any_class(schema["$defs"].pop("JSONLDataModule")["anyOf"])
    options["trainer"]["properties"] |= {name: {} for name in OPEN}
    return schema


def _any_class(forms: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of a class of ours, which overlays do not name, or of another one.

    Args:
        forms: what jsonargparse takes for the class, one form for each of its subclasses.
    """
    classes = [form["properties"] for form in forms if "properties" in form]
    paths = [form["class_path"]["const"] for form in classes]
    names = {"enum": [*(path.rpartition(".")[2] for path in paths), *paths]}
    options: dict[str, Any] = {}
    for form in classes:
        for name, option in form["init_args"]["properties"].items():
            options[name] = _either(options[name], option) if name in options else option
    arguments = {"type": "object", "additionalProperties": False, "properties": options}
    ours = {"class_path": names, "init_args": arguments}
    others = {"class_path": {"type": "string", "not": names}}
    return {
        "anyOf": [
            {"type": "object", "additionalProperties": False, "properties": ours},
            {"type": "object", "required": ["class_path"], "properties": others},
        ]
    }


def _either(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an option that two classes have by one name, each with its values."""
    forms = forms_of(one)
    forms += [form for form in forms_of(other) if form not in forms]
    texts = {key: value for key, value in one.items() if key in TEXTS}
    return texts | {"anyOf": forms} if len(forms) > 1 else one


def forms_of(option: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the schemas of the forms that an option's value may have."""
    values = {key: value for key, value in option.items() if key not in TEXTS}
    return list(option.get("anyOf", [values]))
