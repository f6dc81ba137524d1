"""Exams: items with a known answer, and how a reply is judged."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.data.formats import Message, iter_rows, parse_prompt
from minigpt.errors import DataError

PUNCTUATION = ".,;:!?…。，；：！？、\"'“”‘’ \n\t"


@dataclass(frozen=True)
class Item:
    """One exam item.

    Attributes:
        id: names the item.
        family: the table row it counts for.
        messages: what the model is asked.
        answer: what its reply must be or hold.
        choices: possible answers; then the reply must hold the right one and no other.
        avoid: markers of a bad style; then the reply must hold the answer and no marker.
    """

    id: str
    family: str
    messages: tuple[Message, ...]
    answer: str
    choices: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()


def load_exam(path: str | Path) -> list[Item]:
    """Read an exam file.

    Raises:
        DataError: for a missing file or an item without a prompt or an answer.
    """
    return [_item(row, path, line) for line, row in iter_rows(path)]


def _item(row: object, path: str | Path, line: int) -> Item:
    try:
        messages = parse_prompt(row)
    except DataError as error:
        raise error.at(path, line) from None
    answer = row.get("answer") if isinstance(row, dict) else None
    if not isinstance(row, dict) or isinstance(messages, str) or not isinstance(answer, str):
        raise DataError(
            "an exam item needs messages and an answer",
            path=path,
            line=line,
            remedy='Give {"id", "family", "messages": [...], "answer": "..."}.',
        )
    choices, avoid = (_strings(row, key, path, line) for key in ("choices", "avoid"))
    if choices and normalise(answer) not in map(normalise, choices):
        raise DataError(
            f"is {answer!r:.40}, which is not among the choices",
            path=path,
            line=line,
            field="answer",
            remedy="Give the right one of the choices, word for word.",
            reason="wrong_type",
        )
    return Item(
        id=str(row.get("id", line)),
        family=str(row.get("family", Path(path).stem)),
        messages=messages,
        answer=answer,
        choices=choices,
        avoid=avoid,
    )


def _strings(row: dict[str, Any], key: str, path: str | Path, line: int) -> tuple[str, ...]:
    """Read an optional list of strings; one that says nothing would be in every reply."""
    value = row.get(key) or []
    if not isinstance(value, list) or not all(isinstance(s, str) and s.strip() for s in value):
        problem = "must be a list of strings that are not empty"
        raise DataError(problem, path=path, line=line, field=key, reason="wrong_type")
    return tuple(value)


def fold(text: str) -> str:
    """Fold case and width."""
    if text.isascii():  # quickly, because data have many texts
        return text.lower()
    return unicodedata.normalize("NFKC", text).casefold()


def normalise(text: str) -> str:
    """Fold case and width and strip outer spaces and punctuation."""
    return fold(text).strip(PUNCTUATION)


def _chosen(said: str, choices: tuple[str, ...]) -> set[str]:
    """Return the choices that a reply holds; within the words of a longer one none counts."""
    found = set()
    for choice in sorted(filter(None, map(normalise, choices)), key=len, reverse=True):
        if choice in said:
            found.add(choice)
            said = said.replace(choice, "\n")
    return found


def is_right(reply: str, item: Item) -> bool:
    """Judge a reply: see `Item` for the three rules; otherwise it must equal the answer."""
    said, answer = normalise(reply), normalise(item.answer)
    if item.choices:
        return _chosen(said, item.choices) == {answer}
    if item.avoid:
        return answer in said and not any(fold(m) in fold(reply) for m in item.avoid)
    return said == answer
