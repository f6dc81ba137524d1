"""What is put in its place stays there, also after a power cut."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt.data import store
from minigpt.files import atomic_file, publish


def a_file(place: Path, partial: Path) -> None:
    with atomic_file(place) as path:
        path.write_text("x")


def a_directory(place: Path, partial: Path) -> None:
    publish(partial, place)


def a_store(place: Path, partial: Path) -> None:
    store._publish(partial, place, "text")


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
