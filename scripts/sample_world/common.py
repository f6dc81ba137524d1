"""Small helpers that every kind of sample data shares."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from random import Random
from typing import Any, TypeVar

Message = dict[str, str]
Row = dict[str, Any]
T = TypeVar("T")

LANGS = ("en", "zh")


def stream(seed: int, name: str) -> Random:
    """Return an independent random stream, so that one kind never shifts another."""
    return Random(f"minigpt:{seed}:{name}")


def bucket(key: str) -> int:
    """Return a number from 0 to 99 that depends on an item's own text alone."""
    return zlib.crc32(key.encode("utf-8")) % 100


def split_of(key: str) -> str:
    """Assign an item to `train`, `dev` or `exam` by its own text: 80, 8 and 12 per cent."""
    return "exam" if bucket(key) < 12 else "dev" if bucket(key) < 20 else "train"


def user(text: str) -> Message:
    """Return one user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return one assistant message."""
    return {"role": "assistant", "content": text}


def system(text: str) -> Message:
    """Return one system message."""
    return {"role": "system", "content": text}


def chat(question: str, answer: str) -> Row:
    """Return a chat row of a single question and its answer."""
    return {"messages": [user(question), assistant(answer)]}


def cycle(rng: Random, items: Sequence[T], count: int) -> list[T]:
    """Draw `count` items with every item used as evenly as possible."""
    drawn: list[T] = []
    while len(drawn) < count:
        batch = list(items)
        rng.shuffle(batch)
        drawn.extend(batch)
    return drawn[:count]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """Return a shuffled copy."""
    copy = list(items)
    rng.shuffle(copy)
    return copy


def capital(text: str) -> str:
    """Upper-case the first letter and leave the rest alone."""
    return text[:1].upper() + text[1:]


# How prose marks a question and what stands between it and its answer.
_BEFORE = {
    "en": ("", "", "Question: ", "Visitor: ", "user: ", "Somebody asked: "),
    "zh": ("", "", "问：", "游客：", "user: ", "有人问："),
}
_BETWEEN = {
    "en": (
        "\n",
        "\nAnswer: ",
        "\nGuide: ",
        "\nThe guide thought about it and said: ",
        "\nassistant: ",
        "\n\nassistant\n",
        "\nAnd this was the reply:\n",
    ),
    "zh": (
        "\n",
        "\n答：",
        "\n导游：",
        "\n导游想了一想，说：",
        "\nassistant: ",
        "\n\nassistant\n",
        "\n回答是这样的：\n",
    ),
}


def in_prose(rng: Random, question: str, answer: str, lang: str) -> str:
    """Write a question and its answer as pretraining text does."""
    return rng.choice(_BEFORE[lang]) + question + rng.choice(_BETWEEN[lang]) + answer
