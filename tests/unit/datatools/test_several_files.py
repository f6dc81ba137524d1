"""check, stats and show take files, folders and patterns alike, and names of keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

VERBS = ("check", "stats", "show")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "data" / "more").mkdir(parents=True)
    paths = [tmp_path / "data" / name for name in ("a.jsonl", "b.csv", "more/c.jsonl")]
    for path in paths:
        row = {"ask": f"the {path.stem}?", "reply": "cat sat"}
        path.write_text(
            f"{','.join(row)}\n{','.join(row.values())}\n"
            if path.suffix == ".csv"
            else json.dumps(row)
        )
    return paths


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("form", ["files", "folder", "pattern"])
def test_files_are_named_in_any_way(
    verb: str, form: str, files: list[Path], tokenizer_dir: Path, minigpt: Any
) -> None:
    folder = files[0].parent
    named = {"files": files, "folder": [folder], "pattern": [f"{folder}/*.*", f"{folder}/more/*"]}
    renamed = ("--columns", "ask=prompt", "reply=completion")
    options = ("--tokenizer", tokenizer_dir) if verb == "show" else ()
    outcome = minigpt("data", verb, *named[form], *options, *renamed)
    assert (outcome.status, outcome.err) == (0, "")
    if verb == "check":
        assert outcome.out == "3 rows checked: 0 errors, 0 hints\n"
    else:
        assert all(str(path) in outcome.out for path in files)


@pytest.mark.parametrize("verb", VERBS)
def test_keys_that_are_not_mapped_are_named(
    verb: str, files: list[Path], tokenizer_dir: Path, minigpt: Any
) -> None:
    outcome = minigpt("data", verb, *files, "--tokenizer", tokenizer_dir)
    assert outcome.status == 2
    assert "['ask', 'reply']" in outcome.out + outcome.err or "no chat row" in outcome.err
