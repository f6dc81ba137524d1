"""Degenerate replies: repetition, loops at the end, replies that never end."""

from __future__ import annotations

import re
from collections.abc import Sequence

from minigpt.evaluate.scores import Score, share
from minigpt.infer.engine import Reply

# Words, single characters of scripts that write without spaces, and marks, so that models
# with different tokenizers compare.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
LOOP = 3  # times in a row that a passage must stand to be a loop
WORD_LOOP = 6  # times, for a passage of one word
LONGEST = 32  # words of the longest passage that counts as a loop


def words(text: str) -> list[str]:
    """Cut a text into words."""
    return WORD.findall(text)


def ngrams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all runs of n words."""
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def loops(text: Sequence[str]) -> bool:
    """Whether a text, cut into words, ends in a loop."""
    for size in range(1, LONGEST + 1):
        times = WORD_LOOP if size == 1 else LOOP
        tail = text[-size * times :]
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
    texts = [words(reply.text) for reply in replies]
    fours = [ngrams(text, 4) for text in texts]
    total = sum(map(len, fours))
    repeated = 1 - sum(len(set(grams)) for grams in fours) / total if total else 0.0
    distinct = {}
    for n in (1, 2):
        grams = [gram for text in texts for gram in ngrams(text, n)]
        distinct[f"distinct-{n}"] = Score(len(set(grams)) / max(1, len(grams)), len(grams))
    return {
        "repeated 4-grams": Score(repeated, total),
        **distinct,
        "loop rate": share([loops(text) for text in texts]),
        "end rate": share([reply.ended_by is not None for reply in replies]),
        "length": Score(sum(len(reply.ids) for reply in replies) / len(replies), len(replies)),
    }
