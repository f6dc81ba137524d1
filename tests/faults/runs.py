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
from signal import SIGKILL
from typing import Any

from leftovers import running
from patience import eventually

HERE = Path(__file__).parent


@dataclass
class Running:
    """A process in which a verb runs."""

    starter: Starter
    pid: int
    log: Path
    status: int | None = None

    def ended(self) -> bool:
        """Return whether it has ended; then `status` is its exit status."""
        if self.status is None:
            self.status = self.starter.ask({"ended": self.pid})
        return self.status is not None

    def wait(self, seconds: float = 600) -> int:
        """Return the exit status; negative when a signal killed it."""
        eventually(self.ended, seconds, lambda: self.output)
        assert self.status is not None
        return self.status

    def send(self, signal: int) -> None:
        os.kill(self.pid, signal)

    def since_the_signal(self) -> float:
        """Return the seconds since `moments.At` sent its signal."""
        return time.time() - float(self.output.rpartition("struck at ")[2].split()[0])

    def group(self) -> list[str]:
        """Return the processes of the run that live, also when the first has ended."""
        stats = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                stats[path.parent.name] = path.read_text().rpartition(")")[2].split()
        return [
            process
            for process, (state, _, group, *_) in stats.items()
            if group == str(self.pid) != process and state != "Z"
        ]

    def end(self) -> bool:
        """Kill what is left of it; return whether that should have ended by itself."""
        left = running(self.pid)
        if not left and (self.status or 0) >= 0:  # nobody could end the rest of a killed one
            with suppress(AssertionError):
                eventually(lambda: not self.group(), 10)
            left = bool(self.group())
        with suppress(ProcessLookupError):
            os.killpg(self.pid, SIGKILL)
        eventually(lambda: not running(self.pid) and not self.group())
        return left

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Starter:
    """The process that forks the runs."""

    def __init__(self) -> None:
        self.runs: list[Running] = []
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "starter.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Return the answer to a request, which comes at once."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except BaseException:  # e.g. a time-out: the next answer would be that of this request
            self.process.kill()
            raise

    def start(self, args: list[str], log: Path, **more: Any) -> Running:
        """Start `minigpt ARGS`."""
        pid = self.ask({"args": args, "log": str(log), **more})
        self.runs.append(Running(self, pid, log))
        return self.runs[-1]

    def end_runs(self) -> list[str]:
        """Kill what is left of all runs; return the logs of those that should have ended."""
        runs, self.runs = self.runs, []
        return [str(run.log) for run in runs if run.end()]

    def lives(self) -> bool:
        """Return whether it can start runs."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


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


def after_saving(number: int) -> list[dict[str, Any]]:
    """Return the config of a callback that kills a run right after it has saved a checkpoint."""
    return [{"class_path": "moments.AfterSaving", "init_args": {"number": number}}]


def slow(seconds: float, **more: Any) -> list[dict[str, Any]]:
    """Return the config of a callback that slows a run down."""
    return [{"class_path": "moments.Slow", "init_args": {"seconds": seconds, **more}}]


def until(file: Path) -> list[dict[str, Any]]:
    """Return the config of a callback that has a run wait for a file before it trains."""
    return [{"class_path": "moments.Until", "init_args": {"file": str(file)}}]


def blocked_in(function: str, number: int = 0) -> list[dict[str, Any]]:
    """Return the config of a callback that keeps a run in a function until it is killed."""
    return [{"class_path": "moments.Hold", "init_args": {"function": function, "number": number}}]


def meet(this_run: Path, other: Path) -> list[dict[str, Any]]:
    """Return the config of a callback that has two runs build their store at once."""
    files = {"marker": f"{this_run}-built", "other": f"{other}-built"}
    return [{"class_path": "moments.Meet", "init_args": files}]


def status(run_dir: Path) -> dict[str, Any]:
    """Return what a run's status file says."""
    content: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return content


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Return the logged numbers, without times and speeds."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    drop = ("time", "tokens_per_s", "rollout/seconds", "update/seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]
