"""What the tests of faults share: processes, moments, and how to read what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass
class Running:
    """A process in which a verb runs."""

    starter: Starter
    pid: int
    log: Path

    def wait(self) -> int:
        """Return the exit status; negative when a signal killed it."""
        return int(self.starter.ask({"wait": self.pid}))

    def send(self, signal: int) -> None:
        os.kill(self.pid, signal)

    def since_the_signal(self) -> float:
        """Return the seconds since `moments.At` sent its signal."""
        return time.time() - float(self.told.rpartition("struck at ")[2].split()[0])

    def group(self) -> list[str]:
        """Return the processes of the run that live, also when the first has ended."""
        stats = {}
        for place in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                stats[place.parent.name] = place.read_text().rpartition(")")[2].split()
        return [p for p, (_, _, group, *_) in stats.items() if group == str(self.pid) != p]

    @property
    def told(self) -> str:
        return self.log.read_text()


class Starter:
    """The process that forks the runs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "starter.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def start(self, args: list[str], log: Path, **more: Any) -> Running:
        return Running(self, int(self.ask({"args": args, "log": str(log), **more})), log)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


Start = Callable[..., Running]
OPTIONS: dict[str, Any] = {
    "trainer__max_steps": 8,
    "trainer__accumulate_grad_batches": 2,
    "trainer__val_check_interval": 5,
    "checkpoint": {"every": 3, "keep": 9},
}


def at(moment: str, number: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Return the config of a callback that sends a signal at a moment."""
    return [{"class_path": "moments.At", "init_args": {"moment": moment, "number": number, **more}}]


def slow(seconds: float, **more: Any) -> list[dict[str, Any]]:
    """Return the config of a callback that slows a run down."""
    return [{"class_path": "moments.Slow", "init_args": {"seconds": seconds, **more}}]


def meet(mine: Path, other: Path) -> list[dict[str, Any]]:
    """Return the config of a callback that has two runs build their store at once."""
    files = {"mine": f"{mine}-built", "other": f"{other}-built"}
    return [{"class_path": "moments.Meet", "init_args": files}]


def eventually(happened: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until something is true, and return it."""
    until = time.monotonic() + seconds
    while not (value := happened()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
    return value


def status(run_dir: Path) -> dict[str, Any]:
    """Return what a run's status file says."""
    said: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return said


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Return the logged numbers, without times and speeds."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    drop = ("time", "tokens_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]
