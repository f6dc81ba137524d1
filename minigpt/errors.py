"""The errors that users meet.

Each is printed as one paragraph without a traceback, and the process ends with
`exit_code`. Anything else that escapes is a defect of MiniGPT and keeps its traceback.

    MiniGPTError
    ├── ConfigError          a config or command line that cannot be run
    │   └── RunExistsError   the run directory already holds a run
    ├── DataError            a file or row that cannot be read
    ├── TokenizerError       a tokenizer that cannot be made or used
    ├── ModelError           a model, adapter or checkpoint that cannot be used
    ├── TrainingError        a run that cannot go on (non-finite numbers, no room to save)
    ├── ProcessLost          another process of the run has died
    └── Stopped              a run that was asked to stop, and has saved
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PREEMPTED, INTERRUPTED = 75, 130  # sysexits.h EX_TEMPFAIL: try again later; 128 + SIGINT


class MiniGPTError(Exception):
    """Base of all errors that users meet; `str(error)` is the paragraph they read."""

    exit_code = 2


class ConfigError(MiniGPTError):
    """A config or command line that cannot be run as it stands."""


class RunExistsError(ConfigError):
    """The run directory already holds a run, and nobody asked to resume or overwrite it."""


class TokenizerError(MiniGPTError):
    """A tokenizer that cannot be trained, loaded or used for this model."""


class ModelError(MiniGPTError):
    """A model, adapter or checkpoint that is missing, damaged or does not fit."""


class TrainingError(MiniGPTError):
    """A run that cannot go on, such as one whose loss is not finite."""


class ProcessLost(MiniGPTError):  # noqa: N818  (what happened elsewhere)
    """Another process of the run has died; the run may be tried again."""

    exit_code = 1


class Stopped(MiniGPTError):  # noqa: N818  (no error: what was asked for)
    """A run that was asked to stop, and has saved.

    Args:
        message: what the user reads.
        exit_code: 75 after SIGTERM (preempted: try again), 130 after SIGINT.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(SystemExit):
    """Unwinds a process that a signal has asked to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(PREEMPTED)
        self.number = number


class DataError(MiniGPTError):
    """A file or row that cannot be read.

    Args:
        problem: what is wrong, in words ("'role' must be a string").
        path: the file it is in.
        line: 1-based line (JSONL) or item number (JSON array) of the row.
        field: the field inside the row, as a path such as ``messages[2].role``.
        remedy: what the user can do about it.
        reason: a short stable key, by which skipped rows are counted.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
        remedy: str | None = None,
        reason: str = "bad_row",
    ) -> None:
        self.problem, self.path, self.line = problem, path, line
        self.field, self.remedy, self.reason = field, remedy, reason
        super().__init__(self._paragraph())

    def _paragraph(self) -> str:
        location = ":".join(str(p) for p in (self.path, self.line, self.field) if p)
        text = f"{location}: {self.problem}" if location else self.problem
        return f"{text.rstrip('.')}. {self.remedy}" if self.remedy else text

    def at(self, path: str | Path, line: int | None = None) -> DataError:
        """Return the same error with file and line filled in."""
        return DataError(
            self.problem,
            path=path,
            line=line,
            field=self.field,
            remedy=self.remedy,
            reason=self.reason,
        )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a library written in Rust, which is no `Exception`."""
    return type(error).__name__ == "PanicException"
