"""Waiting in tests: for conditions, with limits that grow where the machine is slow or busy.

A limit only ends what would hang. It is ample on an idle machine, and scaled by how much longer
than expected a fixed piece of work took when the session began.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

EXPECTED = 0.25  # seconds that the piece of work takes on an idle core
VARIABLE = "MINIGPT_TEST_SLOWNESS"  # child processes read it


def slowness() -> float:
    """Return how many times longer than expected a piece of work took; at least 1."""
    if VARIABLE not in os.environ:
        started = time.perf_counter()
        sum(number * number for number in range(3_000_000))
        taken = time.perf_counter() - started
        os.environ[VARIABLE] = f"{max(1.0, taken / EXPECTED):.2f}"
    return float(os.environ[VARIABLE])


def limit(seconds: float) -> float:
    """Return the seconds that something may take here which is to take fewer than `seconds`."""
    return seconds * slowness()


def eventually(
    happened: Callable[[], Any], seconds: float = 120, told: Callable[[], str] = str
) -> Any:
    """Wait until something is true, and return it.

    Args:
        happened: asked again and again.
        seconds: limit on an idle machine.
        told: gives what there is to read about it when the limit is over.
    """
    until = time.monotonic() + limit(seconds)
    while not (value := happened()):
        assert time.monotonic() < until, f"it did not happen in time: {told()}"
        time.sleep(0.01)
    return value
