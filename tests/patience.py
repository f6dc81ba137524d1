"""Waiting in tests: for conditions, with limits that grow where the machine is slow or busy.

A limit only ends what would hang. It is ample on an idle machine, and scaled by how slow the
machine was when the session began.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

EXPECTED = 0.25  # seconds that the piece of work takes on an idle core
VARIABLE = "MINIGPT_TEST_SLOWNESS"  # child processes read it


def slowness() -> float:
    """Return how many times longer than expected work takes; at least 1.

    It is the larger of how much longer a fixed piece of work took, which also tells of a slow
    processor, and the processes that each core had to share among in the last minute.
    """
    if VARIABLE not in os.environ:
        started = time.perf_counter()
        sum(number * number for number in range(3_000_000))
        taken = (time.perf_counter() - started) / EXPECTED
        shared = os.getloadavg()[0] / (os.cpu_count() or 1)
        os.environ[VARIABLE] = f"{max(1.0, taken, shared):.2f}"
    return float(os.environ[VARIABLE])


def limit(seconds: float) -> float:
    """Return the seconds that something may take here which is to take fewer than `seconds`."""
    return seconds * slowness()


def eventually(
    happened: Callable[[], Any], seconds: float = 300, message: Callable[[], str] = str
) -> Any:
    """Wait until something is true, and return it.

    Args:
        happened: asked again and again.
        seconds: limit on an idle machine.
        told: gives what there is to read about it when the limit is over.
    """
    until = time.monotonic() + limit(seconds)
    while not (value := happened()):
        assert time.monotonic() < until, f"it did not happen in time: {message()}"
        time.sleep(0.01)
    return value
