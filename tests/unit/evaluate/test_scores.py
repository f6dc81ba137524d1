"""Intervals of shares."""

from __future__ import annotations

import math

import pytest

from minigpt.evaluate.scores import Score, share, wilson


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (81, 100), (1, 1), (2.5, 7)])
def test_wilson_intervals_end_where_the_share_is_1_96_deviations_off(
    right: float, total: int
) -> None:
    low, high = wilson(right, total)
    assert 0 <= low <= right / total <= high + 1e-9
    for end in (low, high) if 0 < right < total else (high,) if right == 0 else (low,):
        off = abs(right / total - end) / math.sqrt(end * (1 - end) / total)
        assert off == pytest.approx(1.96, abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)


def test_scores_are_written_with_their_intervals() -> None:
    assert str(share([True] * 81 + [False] * 19)) == "81.0% (72.2–87.5)"
    assert str(Score(1234.567, 3)) == "1235"
    assert Score(0.5, 3).plain() == {"value": 0.5, "n": 3}
