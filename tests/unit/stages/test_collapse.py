"""The watch on repetition and on answers that do not end."""

from __future__ import annotations

import pytest

from minigpt.errors import ConfigError, TrainingError
from minigpt.stages.collapse import Collapse, CollapseWatch, repeated_ngrams


def test_repeated_ngrams_by_hand() -> None:
    same = [5] * 8  # five 4-grams, of which four occurred before
    turns = [1, 2, 1, 2, 1, 2]  # 1212, 2121, 1212
    assert repeated_ngrams([same]) == pytest.approx(4 / 5)
    assert repeated_ngrams([turns]) == pytest.approx(1 / 3)
    assert repeated_ngrams([same, turns, [1, 2, 3], []]) == pytest.approx((4 / 5 + 1 / 3) / 4)
    assert repeated_ngrams([[1, 1, 1]], n=1) == pytest.approx(2 / 3)
    assert repeated_ngrams([]) == 0.0


def test_stops_after_steps_in_a_row_above_one_bound() -> None:
    watch = CollapseWatch(Collapse("stop", repeated=0.2, unfinished=0.3, steps=3))
    for repeated, unfinished in [(0.3, 0), (0.3, 0.9), (0.2, 0.9), (0.3, 0), (0.3, 0.9), (0, 0.9)]:
        watch.observe(repeated, unfinished)  # three steps are above a bound, but not above one
    with pytest.raises(TrainingError, match=r"^For 3 steps, answers cut off .* than 30% \(now 90%"):
        watch.observe(0, 0.9)
    for _ in range(2):
        watch.observe(0.25, 0)
    with pytest.raises(TrainingError, match=r"^For 3 steps, 4-grams .* more than 20% \(now 25%"):
        watch.observe(0.25, 0)


def test_warns_once_until_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(Collapse(steps=2))
    for repeated in (1, 1, 1, 1, 0, 1, 1):
        watch.observe(repeated, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    silent = CollapseWatch(Collapse("off", steps=1))
    silent.observe(1, 1)
    assert len(caplog.records) == 2


def test_a_resumed_watch_goes_on_counting() -> None:
    """Also one whose options were changed from warn to stop."""
    first = CollapseWatch(Collapse("warn", steps=2))
    for _ in range(3):
        second = CollapseWatch(Collapse("stop", steps=2))
        second.load_state_dict(first.state_dict())
        first.observe(0, 1)
    with pytest.raises(TrainingError, match="For 2 steps, answers cut off"):
        second.observe(0, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repeated": 1.2}, "collapse.repeated is a share from 0 to 1, but is 1.2"),
        ({"unfinished": float("nan")}, "collapse.unfinished is a share from 0 to 1, but is nan"),
        ({"steps": 0}, "collapse.steps must be at least 1, but is 0"),
    ],
)
def test_bounds_out_of_range_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Collapse(**options)  # type: ignore[arg-type]
