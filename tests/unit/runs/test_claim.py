"""A run directory whose entries are not what a run left there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


KINDS = ["folder", "pipe", "link to nothing", "file", "link to a file"]


def put(kind: str, path: Path, other: Path) -> None:
    """Put something into the place of a file; a link leads to `other`."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "inside").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.touch()
    else:
        path.symlink_to(other)


@pytest.mark.parametrize("name", PLAIN_FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_moved_aside(name: str, kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / name, tmp_path / "other"
    path.parent.mkdir(exist_ok=True)
    if kind == "link to a file":
        other.touch()
    put(kind, path, other)
    make_way(tmp_path)
    moved = [aside / path.name for aside in tmp_path.glob("aside-*")]
    stays = kind == "file" or (kind == "link to a file" and name == "metrics.jsonl")
    assert os.path.lexists(path) == stays
    assert [os.path.lexists(one) for one in moved] == ([] if stays else [True])
    if kind == "folder":
        assert (moved[0] / "inside").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_and_follows_no_link(
    kind: str, fit: Callable[..., Any], tmp_path: Path
) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    saving = {"checkpoint": {"every": 1, "best": "val/loss"}}
    assert fit("sft", trainer__max_steps=2, **saving).status == 0
    elsewhere.mkdir()
    if kind == "link to a file":
        for name in PLAIN_FILES:
            (elsewhere / Path(name).name).write_text("junk\n")
    for name in PLAIN_FILES:
        put(kind, run_dir / name, elsewhere / Path(name).name)
    if kind in ("file", "link to a file"):
        (run_dir / "metrics.jsonl").write_text("junk\n")
    before = {path.name: path.read_text() for path in elsewhere.iterdir()}
    outcome = fit("sft", "--ckpt_path", "auto", trainer__max_steps=3, **saving)
    assert outcome.status == 0, outcome.err
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == before
    for name in PLAIN_FILES:
        path = run_dir / name
        expected = name != "metrics-damaged.jsonl" or kind in ("file", "link to a file")
        assert (path.is_file() and not path.is_symlink()) == expected, name
