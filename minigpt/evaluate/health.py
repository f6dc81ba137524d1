"""The health of what a model writes: does it repeat itself, does it loop, does it end?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from minigpt.evaluate.scores import Score, share
from minigpt.infer.engine import Reply

# Words, single characters of scripts that write without spaces, and marks, so that models
# with different tokenizers compare.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
LOOP = 3  # times that a reply's end is said in a row
LONGEST = 32  # words of a passage that is looked for as a loop


def words(text: str) -> list[str]:
    """Cut a text into words."""
    return WORD.findall(text)


def grams(said: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all runs of n words."""
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]


def loops(said: Sequence[str]) -> bool:
    """Whether a text ends in the same passage three times in a row (a word: six times)."""
    for size in range(1, LONGEST + 1):
        times = max(LOOP, -(-6 // size))
        tail = said[-size * times :]
        if len(tail) == size * times and list(tail) == list(tail[:size]) * times:
            return True
    return False


def health(replies: Sequence[Reply]) -> dict[str, Score]:
    """Measure replies.

    Returns:
        ``repeated 4-grams``, the share of 4-grams that occurred before in the same reply;
        ``distinct-1`` and ``distinct-2``, the share of different n-grams among those of all
        replies; ``loop rate``, ``end rate`` (ended by themselves), and mean ``length`` in tokens.
    """
    said = [words(reply.text) for reply in replies]
    fours = [grams(text, 4) for text in said]
    total = sum(map(len, fours))
    distinct = {}
    for n in (1, 2):
        every = [gram for text in said for gram in grams(text, n)]
        distinct[f"distinct-{n}"] = Score(len(set(every)) / max(1, len(every)), len(every))
    return {
        "repeated 4-grams": Score(
            1 - sum(len(set(g)) for g in fours) / total if total else 0.0, total
        ),
        **distinct,
        "loop rate": share([loops(text) for text in said]),
        "end rate": share([reply.ended_by is not None for reply in replies]),
        "length": Score(sum(len(reply.ids) for reply in replies) / len(replies), len(replies)),
    }
