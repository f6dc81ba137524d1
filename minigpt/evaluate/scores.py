"""Scores with what is needed to judge them: interval, number of items, chance level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

Z95 = 1.959964  # standard deviations of a normal distribution that hold 95% of it


def wilson(right: float, total: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927), which stays inside 0..1.

    Args:
        right: items of `total` that count; it need not be an integer.
        total: number of items; with none the interval is 0 to 1.
    """
    if total < 1:
        return 0.0, 1.0
    rate, spread = right / total, Z95**2 / total
    middle = (rate + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt((rate * (1 - rate) + spread / 4) / total)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        value: the score; shares lie in 0..1.
        n: items it was taken over.
        low: lower end of the 95% interval of a share.
        high: upper end of the interval.
        chance: the score of random guesses.
    """

    value: float
    n: int | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4g}"
        return f"{100 * self.value:.1f}% ({100 * self.low:.1f}–{100 * self.high:.1f})"

    def plain(self) -> dict[str, float]:
        """Return the fields that have a value, as they are written in JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}


Results = dict[str, dict[str, Score]]  # of one model: test to name to score


def share(correct: Sequence[float], chance: float | None = None) -> Score:
    """Return the share of items that are correct, with its interval."""
    count, total = sum(correct), len(correct)
    low, high = wilson(count, total)
    return Score(count / total if total else 0.0, total, low, high, chance)


def tables(results: Mapping[str, Results]) -> dict[str, list[list[str]]]:
    """Return the rows of each test: name, each model's score, chance level, items."""
    rows: dict[str, list[list[str]]] = {}
    names = {(test, name): None for r in results.values() for test in r for name in r[test]}
    for test, name in names:
        scores = [model.get(test, {}).get(name) for model in results.values()]
        first = next(score for score in scores if score)
        level = "" if first.chance is None else f"{100 * first.chance:.1f}%"
        cells = ["–" if score is None else str(score) for score in scores]
        rows.setdefault(test, []).append([name, *cells, level, f"{first.n:,}" if first.n else ""])
    return rows
