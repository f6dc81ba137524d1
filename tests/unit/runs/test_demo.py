from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minigpt.runs.demo import demo_files, demo_prompts


def test_files_of_the_demo_are_known_by_what_they_hold(repo_root: Path, tmp_path: Path) -> None:
    copied = tmp_path / "sft.jsonl"
    shutil.copy(repo_root / "data" / "sft.jsonl", copied)
    changed = tmp_path / "pretrain.jsonl"
    changed.write_text((repo_root / "data" / "pretrain.jsonl").read_text() + "{}\n")
    mini = repo_root / "data" / "mini" / "dpo.jsonl"
    real = repo_root / "data" / "lora" / "security.jsonl"
    files = [copied, changed, mini, real, tmp_path / "gone.jsonl"]
    assert demo_files(files) == [str(copied), str(mini)]


def test_prompts_of_the_demo() -> None:
    assert demo_prompts(["Mira Tolan lives in", "the cat"]) == ["Mira Tolan lives in"]
    assert demo_prompts([]) == []


def test_an_installation_without_the_demo(
    monkeypatch: pytest.MonkeyPatch, repo_root: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("minigpt.__file__", str(tmp_path / "minigpt" / "__init__.py"))
    assert demo_files([repo_root / "data" / "sft.jsonl"]) == []
    assert demo_prompts(["Mira Tolan lives in"]) == []
