"""Prompts to complete: a JSONL of texts or chats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.data.formats import Message, iter_rows, parse_prompt
from minigpt.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """A prompt with the row it came from.

    Attributes:
        content: plain text to continue, or the messages of a chat to answer.
        row: the whole row, returned with the completion.
        number: place in the file.
    """

    content: str | tuple[Message, ...]
    row: dict[str, Any]
    number: int


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read a file of prompts.

    Raises:
        DataError: for a missing file or a row without a prompt.
    """
    prompts: list[Prompt] = []
    for line, row in iter_rows(path):
        try:
            content = parse_prompt(row)
        except DataError as error:
            raise error.at(path, line) from None
        assert isinstance(row, dict)
        prompts.append(Prompt(content, row, len(prompts)))
    return prompts
