"""What is put in its place stays there, also after a power cut."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt.data import store
from minigpt.errors import ModelError
from minigpt.files import MANIFEST, as_json, atomic_file, damage, publish, write_manifest
from minigpt.runs.checkpoints import newest_checkpoint, set_aside


def a_file(place: Path, partial: Path) -> None:
    with atomic_file(place) as path:
        path.write_text("x")


def a_directory(place: Path, partial: Path) -> None:
    publish(partial, place)


def a_store(place: Path, partial: Path) -> None:
    store._publish(partial, place)


@pytest.mark.skipif(sys.platform != "linux", reason="reads names of open files from /proc")
@pytest.mark.parametrize("put", [a_file, a_directory, a_store])
def test_the_rename_is_on_the_disk(
    put: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, partial = tmp_path / "place", tmp_path / "partial"
    partial.mkdir()
    seen: list[tuple[str, bool]] = []

    def noted(handle: int) -> None:
        seen.append((os.readlink(f"/proc/self/fd/{handle}"), place.exists()))

    monkeypatch.setattr(os, "fsync", noted)
    put(place, partial)
    assert seen[-1] == (str(tmp_path), True)


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
