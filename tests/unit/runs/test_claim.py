"""A run directory whose entries are not what a run left there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt.files import write_manifest
from minigpt.runs.checkpoints import newest_checkpoint, newest_first
from minigpt.runs.claim import PLAIN_FILES, make_way

NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), max_size=20)


@given(NAMES)
@example("²")
@example("٣")
@example("007")
@example("+9")
@example(" 9")
@example("9\n")
@example("1_0")
@example("-1")
def test_a_folder_with_an_odd_name_is_no_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    for folder in ("step=1", f"step={name}"):
        (run_dir / "checkpoints" / folder).mkdir(parents=True, exist_ok=True)
        write_manifest(run_dir / "checkpoints" / folder)
    number = int(name) if name.isascii() and name.isdigit() and str(int(name)) == name else None
    names = {f"step={n}" for n in (1, number) if n is not None}
    assert {path.name for path in newest_first(run_dir)} == names
    newest = newest_checkpoint(run_dir)
    assert newest is not None
    assert newest.name == f"step={max(1, number or 0)}"


def test_odd_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = tmp_path / "checkpoints" / "step=²"
    odd.mkdir(parents=True)
    assert newest_checkpoint(tmp_path) is None
    assert caplog.messages == [f"{odd} is left alone: no checkpoint has such a name."]
    assert odd.exists()


@pytest.mark.parametrize("name", PLAIN_FILES)
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "file", "link to a file"])
def test_what_is_no_file_is_moved_aside(name: str, kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / name, tmp_path / "other"
    if kind == "folder":
        path.mkdir()
        (path / "inside").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.touch()
    else:
        path.symlink_to(other)
        if kind == "link to a file":
            other.touch()
    make_way(tmp_path)
    moved = [aside / name for aside in tmp_path.glob("aside-*")]
    assert os.path.lexists(path) == ("file" in kind)
    assert [os.path.lexists(one) for one in moved] == [] if "file" in kind else [True]
    if kind == "folder":
        assert (moved[0] / "inside").exists()
