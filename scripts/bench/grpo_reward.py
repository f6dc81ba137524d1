"""What both trainers are rewarded for: it costs nothing, and differs between answers."""

from __future__ import annotations

from collections.abc import Sequence


def even_tokens(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """Return the share of even token ids in each answer."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
