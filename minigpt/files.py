"""Files and directories that appear whole or not at all, also after a power cut."""

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

from minigpt.errors import MiniGPTError, TrainingError, chain

MANIFEST = "manifest.json"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
NO_ENTRY = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def cache_dir() -> Path:
    """Where what can be made again lies: `$MINIGPT_CACHE`, or `~/.cache/minigpt`."""
    return Path(os.environ.get("MINIGPT_CACHE") or Path.home() / ".cache" / "minigpt")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


class whole_directory:  # noqa: N801  (used like a function)
    """Context manager: fill a directory beside its place, then put it there in one rename.

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
    """Put a finished directory in its place; what was there before is removed afterwards."""
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
    """Return what is wrong with a directory that has a manifest; None when it is whole."""
    try:
        files = json.loads((directory / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"its {MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, known in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {known['bytes']}"
        if digest(path) != known["sha256"]:
            return f"the content of {name} is not what was written"
    return None


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(directory: Path) -> str:
    """Return a short digest of a model directory's weight files."""
    joined = "".join(digest(file) for file in sorted(directory.glob("*.safetensors")))
    return hashlib.sha256(joined.encode()).hexdigest()[:12]


class told_when_unwritable:  # noqa: N801  (used like a function)
    """Context manager that names what could not be written, and why.

    Args:
        place: the file or directory that is written.
    """

    def __init__(self, place: Any) -> None:
        self.place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if own := unwritable(error, self.place):
            raise own from error


def unwritable(error: BaseException | None, place: Any) -> TrainingError | None:
    """Return how to tell that a place cannot be written to; None for another error."""
    if isinstance(error, MiniGPTError):
        return None
    numbers = (_system_error(e) for e in chain(error))
    reason = next((os.strerror(n) for n in numbers if n in NO_ROOM | NO_ENTRY), None)
    if reason is None and "inline_container" in str(error):
        reason = "the file is not whole"  # torch hides the system's error behind its own
    if reason is None:
        return None
    return TrainingError(
        f"{place} could not be written: {reason}. Earlier checkpoints are intact; make room and "
        "go on with --ckpt_path auto."
    )


def _system_error(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors tells it
    return int(found[1]) if found else None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Fill a file beside its place, then put it there in one rename; several processes may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
