"""What all exports share: their place, their name, and a chat template that all engines read."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from minigpt.errors import ConfigError
from minigpt.export.check import renderings

# What an export writes, and so what a later one may replace.
WRITTEN = ("*.safetensors", "*.gguf", "Modelfile", "README.md", "chat_template.jinja")
WRITTEN += ("*config.json", "tokenizer.json", "special_tokens_map.json", "model.*.index.json")
# A tag as Jinja reads it in transformers: with the white space that it swallows.
MARK = re.compile(
    r"(?:\s*\{%-|^[ \t]*\{%|\{%\+?)\s*(?:end)?generation\s*(?:-%\}\s*|\+%\}|%\}\n?)", re.MULTILINE
)


def check_room(place: Path, model: str, overwrite: bool) -> None:
    """Refuse a place where an export would replace something else.

    Args:
        place: the directory or file to be written.
        model: what is exported, which stays.
        overwrite: whether an earlier export may be replaced.

    Raises:
        ConfigError: when the place is taken.
    """
    inside = place.resolve() in (Path(model).resolve(), (Path(model) / "hf").resolve())
    if inside or place.resolve() in Path(model).resolve().parents:
        raise ConfigError(f"{place} holds the model itself. Export it to another place.")
    if not place.exists():
        return
    held = [path.name for path in place.iterdir()] if place.is_dir() else [place.name]
    others = [name for name in sorted(held) if not any(fnmatch(name, w) for w in WRITTEN)]
    if others:
        raise ConfigError(
            f"{place} is no place for an export: it holds {', '.join(others[:3])}. Choose a place "
            "of its own."
        )
    if held and not overwrite:
        raise ConfigError(
            f"{place} already holds an export. Choose another place, or replace it with "
            "--overwrite."
        )


def name_of(model: str) -> str:
    """Return a short name for a run directory, HF directory or hub id."""
    path = Path(model).resolve() if Path(model).exists() else Path(model)
    return path.parent.name if path.name == "hf" else path.name


def use_plain_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Take the ``{% generation %}`` marks, which only transformers knows, out of the template.

    Raises:
        ConfigError: when chats would be rendered otherwise without them.
    """
    if not tokenizer.chat_template:
        return
    before = renderings(tokenizer)
    tokenizer.chat_template = MARK.sub("", tokenizer.get_chat_template())
    if renderings(tokenizer) != before:
        raise ConfigError(
            "The chat template cannot be exported: without its {% generation %} marks it renders "
            "chats otherwise. Put the marks around the assistant's text alone."
        )
