"""What is put in its place stays there, also after a kill; what others put there stays, too."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt import files
from minigpt.data import store
from minigpt.errors import ConfigError, ModelError
from minigpt.files import (
    LOCK,
    MANIFEST,
    NEW,
    OLD,
    SIGNATURE,
    STAGING,
    as_json,
    atomic_directory,
    atomic_file,
    cache_dir,
    clear_leftovers,
    damage,
    is_private,
    make_private,
    remove_directory,
    staging,
    unlisted,
    write_manifest,
)
from minigpt.runs.checkpoints import newest_checkpoint, set_aside

ROOT = Path(__file__).resolve().parents[2]


def tree(directory: Path) -> dict[str, str]:
    """Names of all that is in a directory, each with what it is."""
    return {
        str(path.relative_to(directory)): os.readlink(path)
        if path.is_symlink()
        else path.read_text(errors="replace")
        if path.is_file()
        else "directory"
        for path in directory.rglob("*")
    }


# Renames


def a_file(target: Path) -> None:
    with atomic_file(target) as path:
        path.write_text("x")


def a_directory(target: Path) -> None:
    with atomic_directory(target):
        pass


def a_store(target: Path) -> None:
    with staging(target) as private:
        (private / NEW).mkdir()
        store._publish(private / NEW, target)


@pytest.mark.skipif(sys.platform != "linux", reason="reads names of open files from /proc")
@pytest.mark.parametrize("put", [a_file, a_directory, a_store])
def test_the_rename_is_on_the_disk(
    put: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    synced: list[tuple[str, bool]] = []

    def noted(handle: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), target.exists()))

    monkeypatch.setattr(os, "fsync", noted)
    put(target)
    assert synced[-1] == (str(tmp_path), True)


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    for text in ("first", "second"):
        with atomic_directory(directory) as partial:
            (partial / text).write_text(text)
            assert partial.stat().st_dev == directory.parent.stat().st_dev
    assert tree(tmp_path / "a") == {"b": "directory", "b/second": "second"}


def write_half(directory: Path) -> None:
    with atomic_directory(directory) as partial:
        (partial / "new").write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_is_left_alone_when_the_body_raises(tmp_path: Path, there: bool) -> None:
    directory = tmp_path / "b"
    if there:
        directory.mkdir()
        (directory / "old").write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        write_half(directory)
    assert tree(tmp_path) == ({"b": "directory", "b/old": "whole"} if there else {})


@pytest.mark.parametrize("failing", range(1, 8))
def test_what_was_there_stays_when_a_step_fails(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renames and syncs fail, one at a time: the directory is the old or the new one, whole."""
    target, calls = tmp_path / "b", iter(range(1, 100))
    target.mkdir()
    (target / "old").write_text("whole")

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if next(calls) == failing:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        return call

    monkeypatch.setattr(os, "rename", refusing(os.rename))
    monkeypatch.setattr(os, "fsync", refusing(os.fsync))
    failed = False
    try:
        with atomic_directory(target) as partial:
            (partial / "new").write_text("whole")
    except OSError:
        failed = True
    monkeypatch.undo()
    clear_leftovers(tmp_path)
    either = [{"b": "directory", f"b/{name}": "whole"} for name in ("old", "new")]
    assert tree(tmp_path) in either
    assert failed or tree(tmp_path) == either[1]


def test_what_others_put_into_a_directory_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "b" / "notes" / "deep").mkdir(parents=True)
    for name in ("a.json", "b.json", "notes/deep/c", "d"):
        (tmp_path / "b" / name).write_text("old")
    (tmp_path / "b" / "link").symlink_to("nowhere")
    with atomic_directory(tmp_path / "b", ["*.json"]) as partial:
        for name in ("a.json", "d"):
            (partial / name).write_text("new")
    files_there = {"b/a.json": "new", "b/notes/deep/c": "old", "b/d": "new", "b/link": "nowhere"}
    directories = dict.fromkeys(("b", "b/notes", "b/notes/deep"), "directory")
    assert tree(tmp_path) == files_there | directories


def test_a_file_is_never_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("notes")
    with pytest.raises(NotADirectoryError), atomic_directory(tmp_path / "b"):
        pass
    assert tree(tmp_path) == {"b": "notes"}


# Kills

KILLED = """
import os, sys
from pathlib import Path
from minigpt.files import atomic_directory, atomic_file, remove_directory
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock", "os.scandir"}

def die_before(moment):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        seen += event in EVENTS
        if seen == moment:
            os._exit(9)  # nothing is flushed, released or removed, as when it is killed
    sys.addaudithook(hook)

def write(what, target):
    if what == "directory":
        with atomic_directory(target) as partial:
            (partial / "a").write_text("new")
            (partial / "b").write_text("new")
    elif what == "file":
        with atomic_file(target) as partial:
            partial.write_text("new")
    else:
        remove_directory(target)

for moment in range(1, 200):
    target = Path(sys.argv[2]) / str(moment) / "b"
    target.parent.mkdir()
    if sys.argv[1] == "file":
        target.write_text("old")
    else:
        target.mkdir()
        for name in "ab":
            (target / name).write_text("old")
    child = os.fork()
    if not child:
        die_before(moment)
        write(sys.argv[1], target)
        os._exit(0)
    if not os.waitpid(child, 0)[1]:
        break
"""


def unsigned(directory: Path) -> bool:
    """Whether no lock proves whose it is: killed before it could sign, with nothing in it."""
    children = list(directory.iterdir())
    return not any(child.name != LOCK or child.read_bytes() for child in children)


COMPLETE_STATES: dict[str, list[dict[str, str]]] = {
    "directory": [
        {"b": "directory", "b/a": "old", "b/b": "old"},
        {"b": "directory", "b/a": "new", "b/b": "new"},
    ],
    "file": [{"b": "old"}, {"b": "new"}],
    "removal": [{"b": "directory", "b/a": "old", "b/b": "old"}, {}],
}


@pytest.mark.parametrize("what", COMPLETE_STATES)
def test_a_kill_at_any_moment_loses_nothing_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    """After the next start all is as before or as it was to be; killed between the renames, too."""
    command = [sys.executable, "-c", KILLED, what, str(tmp_path)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    trees, aside = [], 0
    for parent in sorted(tmp_path.iterdir(), key=lambda path: int(path.name)):
        aside += bool(list(parent.glob(f"{STAGING}*/{OLD}"))) and not (parent / "b").exists()
        clear_leftovers(parent)
        for left in parent.glob(f"{STAGING}*"):
            assert unsigned(left)
            shutil.rmtree(left)
        trees.append(tree(parent))
        assert trees[-1] in COMPLETE_STATES[what], parent
    assert trees[0] == COMPLETE_STATES[what][0]
    assert trees[-1] == COMPLETE_STATES[what][1]
    assert aside >= (what == "directory")


# Others' files

NAME = st.one_of(
    st.sampled_from([".b-20261128", ".b-abcdefgh-old", ".b.1.partial", ".step=4-partial", ".lock"]),
    st.text(string.ascii_letters + ".-_=", min_size=1, max_size=8).map(STAGING.__add__),
    st.just(STAGING + hashlib.sha256(b"c").hexdigest()[:16]),
)
CONTENT = st.sampled_from(
    [{}, {"notes": "x"}, {LOCK: ""}, {LOCK: "x", OLD: "x"}, {LOCK: SIGNATURE[:-1].decode()}]
)


@settings(max_examples=60)
@given(st.dictionaries(NAME, CONTENT, min_size=1, max_size=4), st.booleans())
def test_what_no_lock_proves_ours_is_never_touched(
    tmp_path_factory: pytest.TempPathFactory, others: dict[str, dict[str, str]], link: bool
) -> None:
    parent, elsewhere = (tmp_path_factory.mktemp(name) for name in ("parent", "elsewhere"))
    for name, contents in others.items():
        directory = (elsewhere if link else parent) / name
        directory.mkdir(exist_ok=True)
        for file, text in contents.items():
            (directory / file).write_text(text)
        if link:
            (parent / name).symlink_to(directory)
    before = tree(parent), tree(elsewhere)
    a_file(parent / "a")
    a_directory(parent / "b")
    remove_directory(parent / "b")
    clear_leftovers(parent)
    (parent / "a").unlink()
    assert (tree(parent), tree(elsewhere)) == before


@contextmanager
def left_behind(parent: Path) -> Iterator[Path]:
    """A private directory as a killed process leaves it, with what it was making."""
    with staging(parent / "b") as private:
        (private / NEW).write_text("half")
        signed = (private / LOCK).read_bytes()
    directory = parent / f"{STAGING}left"
    directory.mkdir()
    (directory / LOCK).write_bytes(signed)
    (directory / NEW).write_text("half")
    yield directory


def test_the_next_start_puts_back_what_was_aside_even_if_it_fails(tmp_path: Path) -> None:
    with left_behind(tmp_path) as directory:
        (directory / OLD).mkdir()
        (directory / OLD / "old").write_text("whole")
        with pytest.raises(KeyboardInterrupt):
            write_half(tmp_path / "b")
    assert tree(tmp_path) == {"b": "directory", "b/old": "whole"}


def linked(directory: Path) -> None:
    directory.rename(directory.with_name("elsewhere"))
    directory.symlink_to("elsewhere")


def linked_lock(directory: Path) -> None:
    (directory / LOCK).rename(directory.with_name("elsewhere"))
    (directory / LOCK).symlink_to("../elsewhere")


def pipe(directory: Path) -> None:
    (directory / LOCK).unlink()
    os.mkfifo(directory / LOCK)


def outside(directory: Path) -> None:
    (directory / LOCK).write_bytes(SIGNATURE + b"../b")


@pytest.mark.parametrize("harm", [linked, linked_lock, pipe, outside])
def test_leftovers_that_were_tampered_with_stay(
    harm: Callable[[Path], None], tmp_path: Path
) -> None:
    with left_behind(tmp_path) as directory:
        harm(directory)
        clear_leftovers(tmp_path)
        assert (directory / NEW).read_text() == "half"


def test_leftovers_of_another_user_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with left_behind(tmp_path) as directory:
        monkeypatch.setattr(os, "geteuid", lambda: directory.stat().st_uid + 1)
        clear_leftovers(tmp_path)
        assert directory.exists()
        monkeypatch.undo()
        clear_leftovers(tmp_path)
        assert not directory.exists()


def test_what_a_living_process_works_in_stays(tmp_path: Path) -> None:
    with staging(tmp_path / "b") as private:
        (private / OLD).write_text("moved aside")
        a_file(tmp_path / "a")
        clear_leftovers(tmp_path)
        assert (private / OLD).read_text() == "moved aside"
    assert tree(tmp_path) == {"a": "x", "b": "moved aside"}


@pytest.mark.parametrize("put", [atomic_directory, lambda path: atomic_file(path, exclusive=True)])
def test_of_two_that_write_one_path_the_second_is_refused(put: Any, tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "b") as partial:
        (partial / "x").write_text("first")
        with pytest.raises(ConfigError, match="Another process is writing"), put(tmp_path / "b"):
            pass
        a_directory(tmp_path / "c")
    assert tree(tmp_path) == {"b": "directory", "b/x": "first", "c": "directory"}


def test_without_locks_nothing_is_taken_for_a_dead_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr(files.fcntl, "flock", refuse)
        with atomic_directory(tmp_path / "b") as partial:
            (partial / "x").write_text("x")
            clear_leftovers(tmp_path)
    assert tree(tmp_path) == {"b": "directory", "b/x": "x"}


# Links and devices


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a").symlink_to("mine")
    a_file(tmp_path / "a")
    assert tree(tmp_path) == {"a": "x", "mine": "mine"}


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    a_file(tmp_path / "pipe")
    assert os.read(reader, 9) == b"x"
    os.close(reader)


def test_a_device_is_written_to() -> None:
    with pytest.raises(OSError, match="No space left"):
        a_file(Path("/dev/full"))
    assert Path("/dev/full").is_char_device()


# The cache


def test_in_another_users_cache_each_user_has_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert cache_dir() == tmp_path / f"user-{user}"
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "none"))
    assert cache_dir() == tmp_path / "none"


@pytest.mark.parametrize("name", ["d", "d/e", "d/e/f"])
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o775, 0o702])
def test_private_is_what_only_this_user_can_write(
    name: str, mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "f").write_text("x")
    make_private(tmp_path / "d")
    (tmp_path / name).chmod(mode)
    assert is_private(tmp_path / "d") == (mode in (0o700, 0o755))
    make_private(tmp_path / "d")
    assert is_private(tmp_path / "d")
    user = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert not is_private(tmp_path / "d")


def test_links_are_not_private(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to("a")
    assert not is_private(tmp_path / "b")
    assert not is_private(tmp_path / "none")


# Manifests


def checkpoint(path: Path) -> Path:
    """Write a directory with a manifest; the names of its shards differ in one bit."""
    path.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp", "meta.pt"):
        (path / name).write_text(f"{path.name} {name}")
    write_manifest(path)
    return path


def test_each_flipped_bit_of_a_manifest_disqualifies_its_own_checkpoint(tmp_path: Path) -> None:
    before, last = (checkpoint(tmp_path / "checkpoints" / f"step={n}") for n in (9, 10))
    (last / "notes.txt").touch()  # of a user; no part of the checkpoint
    manifest = last / MANIFEST
    written = manifest.read_bytes()
    assert newest_checkpoint(tmp_path) == last
    for position in range(len(written)):
        for bit in range(8):
            flipped = bytearray(written)
            flipped[position] ^= 1 << bit
            manifest.write_bytes(flipped)
            assert newest_checkpoint(tmp_path) == before, (position, bit, bytes(flipped))
    manifest.write_bytes(written)
    assert newest_checkpoint(tmp_path) == last


@given(st.binary(max_size=40) | st.recursive(st.none() | st.integers() | st.text(), st.lists))
@example(b"[" * 100_000)
@example({"files": []})
@example({"files": {"meta.pt": []}})
@example({"files": {"meta.pt": {"bytes": "1", "sha256": 1}}})
@example({"files": {"\0": {"bytes": 1, "sha256": ""}}})
@example({"files": {"x" * 300: {"bytes": 1, "sha256": ""}}})
@example({"files": {".": {"bytes": 1, "sha256": ""}}})
def test_any_other_manifest_is_damage(
    tmp_path_factory: pytest.TempPathFactory, content: object
) -> None:
    path = checkpoint(tmp_path_factory.mktemp("any") / "step=1")
    data = content if isinstance(content, bytes) else as_json(content).encode(errors="replace")
    (path / MANIFEST).write_bytes(data)
    assert damage(path)


def unreadable(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    plain = Path.open

    def refused(self: Path, *args: Any, **options: Any) -> Any:
        if self == path:
            raise OSError(number, os.strerror(number))
        return plain(self, *args, **options)

    monkeypatch.setattr(Path, "open", refused)


@pytest.mark.parametrize("name", [MANIFEST, "meta.pt"])
def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lacks a permission may be whole; a bad sector of a disk is lost."""
    before, last = (checkpoint(tmp_path / "checkpoints" / f"step={n}") for n in (9, 10))
    unreadable(last / name, monkeypatch, errno.EACCES)
    with pytest.raises(ModelError, match=rf"step=10/{name} cannot be read: Permission denied"):
        newest_checkpoint(tmp_path)
    set_aside(tmp_path, 10)
    assert last.exists()
    unreadable(last / name, monkeypatch, errno.EIO)
    assert newest_checkpoint(tmp_path) == before


def test_a_manifest_tells_what_others_have_added_or_changed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/c"):
        (tmp_path / name).write_text(name)
    assert unlisted(tmp_path) == ["a", "b", "sub/c"]
    write_manifest(tmp_path)
    assert unlisted(tmp_path) == []
    (tmp_path / "a").write_text("!")
    (tmp_path / "b").unlink()
    (tmp_path / "b").symlink_to("sub/c")
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub" / "d").write_text("")
    assert unlisted(tmp_path) == ["a", "b", "empty", "sub/d"]
    (tmp_path / files.MANIFEST).write_text("{")
    assert unlisted(tmp_path) == ["a", "b", "empty", files.MANIFEST, "sub/c", "sub/d"]
