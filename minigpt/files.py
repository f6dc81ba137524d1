"""Atomic writes: files and directories appear complete or not at all, also after a power cut."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from minigpt.errors import ConfigError, MiniGPTError, ModelError, TrainingError, chain

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# A private directory, in which something is made or removed: see `staging`.
STAGING = ".minigpt-"
LOCK, NEW, OLD, REMOVED = "lock", "new", "old", "removed"
SIGNATURE = b"A directory of MiniGPT, in use while its process holds this file's lock. It makes: "
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Errors of reading that say what became of a file; others, such as EACCES, say nothing about it.
GONE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_ERRORS = FULL | {errno.EIO}
ACCESS_ERRORS = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def cache_dir() -> Path:
    """Return the directory of what can be made again: `$MINIGPT_CACHE`, or `~/.cache/minigpt`.

    Where that belongs to another user, it is a directory in it for this user alone.
    """
    root = Path(os.environ.get("MINIGPT_CACHE") or Path.home() / ".cache" / "minigpt")
    user = os.geteuid()
    return root if not root.exists() or root.stat().st_uid == user else root / f"user-{user}"


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


@contextmanager
def staging(target: Path, exclusive: bool = False) -> Iterator[Path]:
    """Make a private directory beside a target, to make the target in; remove it afterwards.

    Its name follows no link, and nobody else can write into it. Its file `lock` names the target,
    and this process holds a lock on that file: so it is known, also after a kill, whose it is, and
    whether anybody works in it. What killed processes left in the same parent goes first.

    Args:
        target: what is made; only its parent must be writable.
        exclusive: refuse to work beside another process that makes the same target.

    Raises:
        ConfigError: when another process makes it.
        OSError: when the parent cannot be written to.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target.parent)
    directory = Path(tempfile.mkdtemp(prefix=STAGING, dir=target.parent))
    try:
        lock = _lock_staging(directory, target.name)
    except OSError:
        directory.rmdir()
        raise
    try:
        if exclusive:
            directory = _rename_exclusively(directory, target)
        yield directory
    finally:
        try:
            _remove_staging(directory, target)
        finally:
            os.close(lock)


def _rename_exclusively(directory: Path, target: Path) -> Path:
    """Give a private directory the one name for its target, which no second process can take."""
    path = target.with_name(STAGING + hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16])
    try:
        return directory.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ConfigError(
            f"Another process is writing {target}. Wait for it, or choose another place; if there "
            f"is none, remove {path}, in which it would work."
        ) from error


def _lock_staging(directory: Path, name: str) -> int:
    """Lock a private directory; return the lock's file handle.

    The signature, by which later processes may remove the directory, is written once the lock is
    held. Where the file system has no locks it is not written: nobody could tell that this process
    lives.
    """
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return handle
    try:
        os.write(handle, SIGNATURE + os.fsencode(name))
    except OSError:
        (directory / LOCK).unlink()
        os.close(handle)
        raise
    return handle


def clear_leftovers(parent: Path) -> None:
    """Remove what killed processes of this user left in a directory.

    These are directories that `staging` made and no living process has locked. What such a process
    had moved aside, and not replaced yet, is put back.
    """
    for directory in parent.glob(f"{STAGING}*"):
        with _abandoned(directory) as name:
            if name is not None:
                _remove_staging(directory, parent / name)


@contextmanager
def _abandoned(directory: Path) -> Iterator[str | None]:
    """Hold the lock of a dead process's private directory; yield its target's name.

    Yields None for any other directory.
    """
    try:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK  # no link, nor a pipe that blocks
        handle = os.open(directory / LOCK, flags)
    except OSError:
        yield None
        return
    try:
        yield _abandoned_target(directory, handle)
    finally:
        os.close(handle)


def _abandoned_target(directory: Path, handle: int) -> str | None:
    try:
        made, lock = directory.lstat(), os.fstat(handle)
        ours = made.st_uid == lock.st_uid == os.geteuid()
        if not (ours and stat.S_ISDIR(made.st_mode) and stat.S_ISREG(lock.st_mode)):
            return None
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(lock, (directory / LOCK).lstat()):  # it ended in between
            return None
        text = os.pread(handle, 4096, 0)
    except OSError:
        return None
    name = os.fsdecode(text.removeprefix(SIGNATURE))
    return name if text.startswith(SIGNATURE) and name == Path(name).name else None


def _remove_staging(directory: Path, target: Path) -> None:
    """Remove a private directory; what was moved aside for a target that is missing goes back."""
    old = directory / OLD
    try:
        if os.path.lexists(old):
            is_replaced = os.path.lexists(target)
            # Renamed before it is removed: what a kill leaves of it must not be put back.
            old.rename(directory / REMOVED if is_replaced else target)
    except OSError as error:
        log.warning("%s is kept in %s: %s", target, old, error.strerror)
        return
    with suppress(OSError):  # what cannot be removed now stays, with its lock, for the next time
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        (directory / LOCK).unlink()
        directory.rmdir()


class atomic_directory:  # noqa: N801  (used like a function)
    """Context manager: fill a private directory, then give it the final name in one rename.

    The files are on the disk before the rename is. What had the name is removed afterwards, and
    stays when anything fails.

    Args:
        directory: what is made.
        replaced: patterns of the names that such a directory holds; what has another name in the
            one that is replaced was put there by others, and is kept. None replaces all.

    Raises:
        ConfigError: when another process is writing the same directory.
    """

    def __init__(self, directory: Path, replaced: Sequence[str] | None = None) -> None:
        self.directory = directory
        self.replaced = replaced

    def __enter__(self) -> Path:
        with ExitStack() as stack:
            self.new = stack.enter_context(staging(self.directory, exclusive=True)) / NEW
            self.new.mkdir()
            self.stack = stack.pop_all()
        return self.new

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self.stack:
            if kind is None:
                _publish(self.new, self.directory, self.replaced)


def others_in(directory: Path, patterns: Sequence[str]) -> list[Path]:
    """Return what is in a directory under names that match no pattern."""
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    return [path for path in paths if not any(fnmatch(path.name, each) for each in patterns)]


def _keep_others(directory: Path, new: Path, replaced: Sequence[str]) -> None:
    """Link or copy what others put into a directory into the new one."""
    for path in others_in(directory, (*replaced, f"{STAGING}*")):
        target = new / path.name
        if os.path.lexists(target):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target, symlinks=True, copy_function=_link)
        else:
            _link(path, target)


def _link(path: str | Path, target: str | Path) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:  # not on each file system
        shutil.copy2(path, target, follow_symlinks=False)


def _publish(new: Path, directory: Path, replaced: Sequence[str] | None) -> None:
    """Rename a finished directory to its final path; move aside what was there."""
    for path in new.rglob("*"):
        sync(path)
    if replaced is not None:
        _keep_others(directory, new, replaced)
    sync(new)
    if os.path.lexists(directory):
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        directory.rename(new.with_name(OLD))
    new.rename(directory)
    sync(directory.parent)


def remove_directory(directory: Path) -> None:
    """Remove a directory; if that is cut off, what is left no longer bears its name."""
    with suppress(OSError), staging(directory) as private:  # what cannot be removed stays, whole
        directory.rename(private / REMOVED)


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


def unlisted(directory: Path) -> list[str]:
    """Return the names in a directory that its manifest does not list, or lists otherwise."""
    try:
        listed = _read_manifest(directory / MANIFEST)
    except (OSError, ValueError, RecursionError):
        listed = {}
    others = []
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir() and not path.is_symlink():
            unchanged = any(path.iterdir())  # its files are looked at themselves
        elif name == MANIFEST:
            unchanged = bool(listed)
        else:
            is_listed = name in listed and path.is_file() and not path.is_symlink()
            unchanged = is_listed and digest(path) == listed[name]["sha256"]
        if not unchanged:
            others.append(name)
    return others


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
    reason = system_reason(error)
    if reason is None and "inline_container" in str(error) and not isinstance(error, MiniGPTError):
        reason = "the file is incomplete"  # torch hides the system's error behind its own
    if reason is None:
        return None
    return TrainingError(
        f"{path} could not be written: {reason}. Earlier checkpoints are intact; make room and "
        "go on with --ckpt_path auto."
    )


def system_reason(error: BaseException | None) -> str | None:
    """Return the system's words for a full or read-only disk or a missing permission.

    None for errors of other kinds, and for those that say what to do already.
    """
    if isinstance(error, MiniGPTError):
        return None
    numbers = (_system_error(e) for e in chain(error))
    return next((os.strerror(n) for n in numbers if n in DISK_ERRORS | ACCESS_ERRORS), None)


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk is full or fails."""
    return any(_system_error(e) in DISK_ERRORS for e in chain(error))


def _system_error(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors reports it
    return int(match[1]) if match else None


@contextmanager
def atomic_file(path: Path, exclusive: bool = False) -> Iterator[Path]:
    """Fill a file in a private directory, then give it the final name in one rename.

    A device or a pipe is written to as it is.

    Args:
        path: the file; a link there is replaced, not followed.
        exclusive: refuse to work beside another process that writes the same file. Else the last
            of several replaces what the others wrote.

    Raises:
        ConfigError: when another process writes it.
        OSError: when the disk is full; it names `path`.
    """
    if is_stream(path):
        yield path
        return
    try:
        with staging(path, exclusive) as private:
            new = private / NEW
            yield new
            sync(new)
            new.replace(path)
            sync(path.parent)
    except OSError as error:
        if error.filename is None and error.errno in FULL:  # it names no file that was open already
            error.filename = str(path)
        raise


def is_stream(path: Path) -> bool:
    """Whether a path names a device or a pipe, also one that is an open file of this process."""
    if str(path.absolute().parent) in ("/dev", "/dev/fd"):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def follow_no_link(path: str, flags: int) -> int:
    """Open a file as the `opener` of `open`; raises an OSError for a link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def is_private(path: Path) -> bool:
    """Whether this user made a file or directory, and all in it, and nobody else may write there.

    What a link leads to counts as another's.
    """
    try:
        status = path.lstat()
    except OSError:
        return False
    ours = status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode)
    if not ours or status.st_mode & _OTHERS_WRITE:
        return False
    return all(map(is_private, path.iterdir())) if stat.S_ISDIR(status.st_mode) else True


def make_private(path: Path) -> None:
    """Let nobody else write to a file or directory, and to what is in it."""
    for each in (path, *path.rglob("*")):
        each.chmod(each.stat().st_mode & ~_OTHERS_WRITE)
