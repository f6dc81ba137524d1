"""The health of replies, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from minigpt.evaluate.health import health, loops, words
from minigpt.infer.engine import Reply


def test_words_of_any_script() -> None:
    assert words("It's 3 cats, 猫が好き！") == ["It", "'", "s", "3", "cats", ",", *"猫が好き！"]


@pytest.mark.parametrize(
    ("text", "looped"),
    [
        ("ha " * 6, True),
        ("ha " * 5, False),
        ("so and then it went on and then it went on and then it went on", True),
        ("on and on and on we went", False),
        ("我不知道。我不知道。我不知道。", True),
        ("", False),
    ],
)
def test_loops_at_the_end(text: str, looped: bool) -> None:
    assert loops(words(text)) == looped


def test_health() -> None:
    replies = [
        Reply("a b c d a b c d", [1, 2, 3, 4, 5, 6], 0),  # of five 4-grams four are different
        Reply("x x x x x x x x", [1, 2], None),  # of five 4-grams one
    ]
    scores = health(replies)
    values = {name: one.value for name, one in scores.items()}
    assert values == pytest.approx(
        {
            "repeated 4-grams": 0.5,
            "distinct-1": 5 / 16,
            "distinct-2": 5 / 14,  # ab bc cd da xx
            "loop rate": 0.5,
            "end rate": 0.5,
            "length": 4.0,
        }
    )
    assert scores["repeated 4-grams"].n == 10
    assert health([Reply("", [], 0)])["repeated 4-grams"].value == 0.0
