from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from minigpt.data.bundled import bundled_data, is_bundled


def test_the_bundled_files_are_those_of_the_repository(repo_root: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "data"], cwd=repo_root, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no clone")
    tracked = {repo_root / name for name in listed.stdout.split()}
    assert set(bundled_data(repo_root / "data")) == tracked - {repo_root / "data" / "README.md"}


def test_files_that_a_user_puts_beside_the_bundled_ones_are_the_users(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("configs", "data"):
        shutil.copytree(repo_root / name, tmp_path / name)
    monkeypatch.setattr("minigpt.__file__", str(tmp_path / "minigpt" / "__init__.py"))
    fetched = tmp_path / "data" / "public" / "poems.jsonl"
    fetched.parent.mkdir(exist_ok=True)
    foreign = tmp_path / "data" / "mine.jsonl"
    for path in (fetched, foreign):
        path.write_text('{"text": "a poem"}\n')
        assert not is_bundled(path)
    assert is_bundled(tmp_path / "data" / "sft.jsonl")
    assert is_bundled(repo_root / "data" / "mini" / "sft.jsonl")
