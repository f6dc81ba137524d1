"""What tests wait with, and what ends the processes that they leave."""

from __future__ import annotations

import os
import subprocess
import sys

import leftovers
import patience
import pytest

ORPHANING = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)  # orphan"])
"""


def test_limits_grow_with_the_slowness_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patience.VARIABLE, "2.5")
    assert patience.limit(4) == 10
    cores = os.cpu_count() or 1
    for expected, load, slow in ((1e6, 0.0, 1), (1e6, 3.0 * cores, 3), (1e-6, 0.0, 1000)):
        monkeypatch.delenv(patience.VARIABLE)
        monkeypatch.setattr(patience, "EXPECTED", expected)
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert min(1000, patience.slowness()) == slow


def test_a_wait_ends_with_its_condition_or_tells_what_it_was_for() -> None:
    answers = iter([0, "", "there"])
    assert patience.eventually(lambda: next(answers)) == "there"
    with pytest.raises(AssertionError, match="did not happen in time: the log"):
        patience.eventually(lambda: False, 0, lambda: "the log")


@pytest.mark.skipif(not leftovers.LINUX, reason="processes are found in /proc")
def test_a_process_that_a_test_leaves_is_ended_and_named() -> None:
    before = leftovers.children()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE):
        assert len(leftovers.begun(before)) == 1
    assert leftovers.end(before) == []
    subprocess.run([sys.executable, "-c", ORPHANING], check=True)
    (ended,) = leftovers.end(before, seconds=0)
    assert "# orphan" in ended
    assert leftovers.begun(before) == []
