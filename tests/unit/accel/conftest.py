"""Tests of speed are skipped where it is switched off."""

from __future__ import annotations

import pytest

from minigpt import accel


@pytest.fixture(autouse=True)
def _switched_on() -> None:
    if not accel.ENABLED:
        pytest.skip("MINIGPT_ACCEL=off")
