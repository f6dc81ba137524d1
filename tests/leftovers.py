"""Processes that a test leaves running: found, ended and named. Linux only."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from patience import eventually

LINUX = sys.platform == "linux"
# Helpers of libraries, and of tests/faults, which serve until this process ends.
LASTING = ("resource_tracker", "forkserver", "compile_worker", "starter.py")


def adopt_orphans() -> None:
    """Have descendants whose parent ends become children of this process, not of init."""
    if LINUX:
        set_child_subreaper = 36  # prctl(2)
        ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def children(process: int | None = None) -> set[int]:
    """Return the children of a process, or of this one."""
    pids: set[int] = set()
    for file in Path(f"/proc/{process or os.getpid()}/task").glob("*/children"):
        with suppress(OSError):
            pids.update(map(int, file.read_text().split()))
    return pids


def running(process: int) -> bool:
    """Return whether a process has not ended; a zombie has."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def command(process: int) -> str:
    """Return the command line of a process."""
    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return ""
    return line.replace(b"\0", b" ").decode(errors="replace").strip()


def begun(before: set[int]) -> list[int]:
    """Return the running children that were not there before, and all that runs below them."""
    processes = [
        child
        for child in children() - before
        if running(child) and not any(name in command(child) for name in LASTING)
    ]
    for process in processes:  # which grows
        processes += [child for child in children(process) if running(child)]
    return processes


def end(before: set[int], seconds: float = 5) -> list[str]:
    """Kill what has begun since and does not end by itself in time; return its command lines."""
    if not LINUX:
        return []
    with suppress(AssertionError):
        eventually(lambda: not begun(before), seconds)
    ended = []
    while left := begun(before):
        ended += [f"{process} ({command(process)})" for process in left]
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        eventually(lambda left=left: not any(map(running, left)))
    return ended
