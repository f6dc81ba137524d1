"""Sit an exam: ask the items, judge the replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minigpt.data.exam import Item, is_right
from minigpt.infer.engine import Engine, Sampling


@dataclass(frozen=True)
class Judged:
    """An item, the model's reply, and how it was judged.

    Attributes:
        item: what was asked.
        reply: the text of the reply.
        fits: whether the text fits the item's answer.
        ended: whether the model ended its turn by itself. A model that answers and goes on
            with the next question, as text does, has not given an answer.
    """

    item: Item
    reply: str
    fits: bool
    ended: bool

    @property
    def right(self) -> bool:
        """Whether the reply counts as right."""
        return self.fits and self.ended


def sit(engine: Engine, items: Sequence[Item], sampling: Sampling) -> list[Judged]:
    """Ask all items and judge the replies."""
    replies = engine.complete([item.messages for item in items], sampling)
    return [
        Judged(item, reply.text, is_right(reply.text, item), reply.ended_by is not None)
        for item, reply in zip(items, replies, strict=True)
    ]


def shares(judged: Sequence[Judged]) -> dict[str, float]:
    """Return each family's share of right replies, 0..1."""
    families: dict[str, list[bool]] = {}
    for one in judged:
        families.setdefault(one.item.family, []).append(one.right)
    return {family: sum(rights) / len(rights) for family, rights in families.items()}
