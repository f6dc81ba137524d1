"""Atomic writes: files and directories appear complete or not at all, also after a power cut."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from minigpt.errors import MiniGPTError, ModelError, TrainingError, chain

MANIFEST = "manifest.json"
# Errors of reading that say what became of a file; others, such as EACCES, say nothing about it.
GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
ACCESS_ERRORS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def cache_dir() -> Path:
    """Where what can be made again lies: `$MINIGPT_CACHE`, or `~/.cache/minigpt`."""
    return Path(os.environ.get("MINIGPT_CACHE") or Path.home() / ".cache" / "minigpt")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_text(path, as_json(value))


def as_json(value: object) -> str:
    """Return a value as the text of a JSON file."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


class atomic_directory:  # noqa: N801  (used like a function)
    """Context manager: fill a temporary directory, then give it the final name in one rename.

    The files are on the disk before the rename is.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> Path:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.directory.name}-"
        self.partial = Path(tempfile.mkdtemp(prefix=prefix, dir=self.directory.parent))
        self.partial.chmod(0o755)
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                publish(self.partial, self.directory)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)


def clear_partials(directory: Path) -> None:
    """Remove what killed processes left beside a directory that none may be filling now."""
    for end in ("", "-old"):
        for left in directory.parent.glob(f".{escape(directory.name)}-????????{end}"):
            shutil.rmtree(left, ignore_errors=True)


def publish(partial: Path, directory: Path) -> None:
    """Rename a finished directory to its final path; what was there is removed afterwards."""
    for path in partial.rglob("*"):
        sync(path)
    sync(partial)
    old = partial.with_name(partial.name + "-old")
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Remove a directory; if that is cut off, what is left no longer bears its name."""
    old = directory.with_name(f".{directory.name}-old")
    with suppress(OSError):  # what cannot be removed stays, whole
        directory.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or a directory's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(directory: Path) -> None:
    """Note the size and the SHA-256 of every file in a directory, as the last file in it."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    write_json(directory / MANIFEST, {"files": files})


def damage(directory: Path) -> str | None:
    """Return what is wrong with a directory that has a manifest; None when it is complete.

    Files that the manifest does not name are no damage.

    Raises:
        ModelError: when a file cannot be read that may well be whole, such as for lack of a
            permission.
    """
    try:
        files = _read_manifest(directory / MANIFEST)
    except FileNotFoundError:
        return f"its {MANIFEST} is missing"
    except (ValueError, RecursionError):
        return f"its {MANIFEST} is not what was written"
    except OSError as error:
        return _unreadable(directory / MANIFEST, error)
    problems = (_difference(directory, name, expected) for name, expected in files.items())
    return next((problem for problem in problems if problem), None)


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file in a manifest.

    Raises:
        ValueError: when it is not, to the byte, as `write_manifest` writes it. So a changed name
            cannot hide the file that it stood for behind another one's entry.
    """
    data = path.read_bytes()
    manifest = json.loads(data.decode())
    if as_json(manifest).encode() != data or not isinstance(manifest, dict):
        raise ValueError
    files = manifest.get("files")
    if not isinstance(files, dict) or len(manifest) != 1:
        raise ValueError
    for entry in files.values():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError
    return files


def _difference(directory: Path, name: str, expected: dict[str, Any]) -> str | None:
    """Return how a file differs from its entry in the manifest."""
    path = directory / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if digest(path) != expected["sha256"]:
            return f"the content of {name} is not what was written"
    except OSError as error:
        return _unreadable(path, error)
    return None


def _unreadable(path: Path, error: OSError) -> str:
    """Return that a file is lost, or raise a ModelError when it may be whole."""
    if error.errno in GONE:
        return f"{path.name} cannot be read: {error.strerror}"
    raise ModelError(
        f"{path} cannot be read: {error.strerror}. It may be whole, so the run does not go on "
        "without it. Make it readable, or name another checkpoint with --ckpt_path."
    ) from error


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(directory: Path) -> str:
    """Return a short digest of a model directory's weight files."""
    joined = "".join(digest(file) for file in sorted(directory.glob("*.safetensors")))
    return hashlib.sha256(joined.encode()).hexdigest()[:12]


class explain_unwritable:  # noqa: N801  (used like a function)
    """Context manager that turns an error of writing into a TrainingError that names the path.

    Args:
        path: the file or directory that is written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if explained := unwritable(error, self.path):
            raise explained from error


def unwritable(error: BaseException | None, path: Path | str) -> TrainingError | None:
    """Return the error that says a path cannot be written to; None if `error` is another one."""
    if isinstance(error, MiniGPTError):
        return None
    numbers = (_system_error(e) for e in chain(error))
    reason = next((os.strerror(n) for n in numbers if n in DISK_ERRORS | ACCESS_ERRORS), None)
    if reason is None and "inline_container" in str(error):
        reason = "the file is incomplete"  # torch hides the system's error behind its own
    if reason is None:
        return None
    return TrainingError(
        f"{path} could not be written: {reason}. Earlier checkpoints are intact; make room and "
        "go on with --ckpt_path auto."
    )


def _system_error(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors reports it
    return int(match[1]) if match else None


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Fill a temporary file, then give it the final name in one rename; several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
