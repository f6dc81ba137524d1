"""Sit an exam: ask the items, judge the replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from minigpt.data.exam import Item, is_right
from minigpt.infer.engine import Engine, Sampling


class Judged(NamedTuple):
    """An item, the model's reply, and whether it is right."""

    item: Item
    reply: str
    right: bool


def sit(engine: Engine, items: Sequence[Item], sampling: Sampling) -> list[Judged]:
    """Ask all items and judge the replies."""
    replies = engine.complete([item.messages for item in items], sampling)
    return [
        Judged(item, reply.text, is_right(reply.text, item))
        for item, reply in zip(items, replies, strict=True)
    ]


def shares(judged: Sequence[Judged]) -> dict[str, float]:
    """Return each family's share of right replies, 0..1."""
    families: dict[str, list[bool]] = {}
    for item, _, right in judged:
        families.setdefault(item.family, []).append(right)
    return {family: sum(rights) / len(rights) for family, rights in families.items()}
