"""Claiming a run directory: one process locks it, and an earlier run goes only when asked."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minigpt.errors import ConfigError, RunExistsError
from minigpt.model.restore import BEST_FILE, CHECKPOINTS_DIR

# What a run writes, and a new run removes, but for config.yaml, which it writes over.
RUN_FILES = (
    CHECKPOINTS_DIR,
    "hf",
    "metrics.jsonl",
    "metrics-damaged.jsonl",
    "summary.json",
    "exam.json",
    "status.json",
)
# Names that must be regular files, see `make_way`.
PLAIN_FILES = (
    "metrics.jsonl",
    "metrics-damaged.jsonl",
    "status.json",
    "summary.json",
    "config.yaml",
    "hparams.yaml",
    f"{CHECKPOINTS_DIR}/{BEST_FILE}",
)

log = logging.getLogger(__name__)


def stale_run(run_dir: Path, overwrite: bool) -> list[Path]:
    """Return the files of an earlier run, which the new one replaces.

    Raises:
        RunExistsError: when it holds a run and `overwrite` is false.
    """
    used = [name for name in ("hf", CHECKPOINTS_DIR) if (run_dir / name).exists()]
    if used and not overwrite:
        raise RunExistsError(
            f"{run_dir} already holds a run ({', '.join(used)}). Resume it with --ckpt_path auto "
            "(scripts: --resume), start over with --overwrite true (scripts: --overwrite), or "
            "choose another --run_dir (scripts: --output_dir)."
        )
    return stale_files(run_dir, RUN_FILES)


def stale_files(run_dir: Path, names: Sequence[str]) -> list[Path]:
    """Return which of the named files, and TensorBoard's, an earlier run left."""
    paths = [*(run_dir / name for name in names), *run_dir.glob("events.out.tfevents.*")]
    return [path for path in paths if path.exists()]


def make_way(run_dir: Path) -> None:
    """Move aside what is no regular file, but has the name of one that a run writes.

    A link, too, since some are written by libraries that follow it. But what metrics.jsonl leads to
    is read first, and then replaced, by `JSONLLogger.rewind`.
    """
    for name in PLAIN_FILES:
        path = run_dir / name
        is_link = path.is_symlink() and name != "metrics.jsonl"
        if os.path.lexists(path) and (is_link or not path.is_file()):
            aside = Path(tempfile.mkdtemp(prefix="aside-", dir=run_dir)) / path.name
            path.rename(aside)
            log.warning("%s is no regular file: it is moved to %s.", path, aside)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make and hold a run directory; the system lets go of it even when the process is killed.

    Raises:
        RunExistsError: when another process trains in it.
        ConfigError: when it cannot be written to.
    """
    file = run_dir / ".lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run_dir).close()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        lock = os.open(file, flags, 0o666)
    except OSError as error:
        if file.is_symlink():
            raise ConfigError(
                f"{file} is a link, which no run makes. Remove it, or choose another --run_dir."
            ) from error
        raise ConfigError(
            f"Cannot write to {run_dir}: {error.strerror}. Choose another --run_dir."
        ) from error
    try:
        _lock(lock, run_dir)
        yield
    finally:
        os.close(lock)


def _lock(handle: int, run_dir: Path) -> None:
    try:
        # Not flock, which child processes that outlive a killed run would still hold.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError | PermissionError):  # POSIX leaves open which
            raise RunExistsError(
                f"Another process is training in {run_dir}. Wait for it, or choose another "
                "--run_dir."
            ) from error
        raise ConfigError(
            f"{run_dir} cannot be locked against a second run: {error.strerror}. Choose another "
            "--run_dir, on a file system that has locks."
        ) from error
