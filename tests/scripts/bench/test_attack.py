"""What `attack.py` says of its figures."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import attack
import pytest

Bench = Callable[..., Any]

MET = {
    "answers_changed": 0,
    "first_token_ratio": 3.0,
    "health_attacked_worst_s": 1.0,
    "memory_growth_mb": -19.0,
}


def test_figures_that_meet_all_goals() -> None:
    assert attack.missed_goals(MET) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("answers_changed", 1),
        ("first_token_ratio", 3.1),
        ("first_token_ratio", math.nan),
        ("health_attacked_worst_s", 1.01),
        ("memory_growth_mb", 101.0),
    ],
)
def test_a_goal_that_is_missed_is_named(name: str, value: float) -> None:
    (missed,) = attack.missed_goals(MET | {name: value})
    assert missed == f"{name} is {value:.3g}, and may be {attack.GOALS[name]:g}"


@pytest.mark.parametrize(("more", "status"), [((), 1), (("--print_only",), 0)])
def test_status(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], status: int
) -> None:
    monkeypatch.setattr(attack, "serving", lambda *_: contextlib.nullcontext((0, 0)))
    monkeypatch.setattr(attack, "measure", lambda *_: MET | {"answers_changed": 2})
    outcome = bench("attack", *more)
    assert outcome.status == status
    assert "answers_changed" in outcome.out
    assert ("answers_changed is 2, and may be 0" in outcome.err) == bool(status)
