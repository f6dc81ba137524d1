"""The page that follows a batch through the code, and how long that walk is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def walk() -> ModuleType:
    spec = importlib.util.spec_from_file_location("walk", ROOT / "scripts" / "walk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_page_lead_to_the_definitions(walk: ModuleType) -> None:
    page = walk.PAGE.read_text(encoding="utf-8")
    assert len(walk.ANCHOR.findall(page)) > 20
    assert page == walk.with_anchors(page), "run: python scripts/walk.py --anchors"


def test_a_name_that_is_gone_is_noticed(walk: ModuleType) -> None:
    with pytest.raises(KeyError, match="no_such_function"):
        walk.with_anchors('[`x`](../minigpt/files.py#L1 "no_such_function")')


def test_the_walk_is_short_and_on_the_page(walk: ModuleType) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "walk.py", "--functions"],
        capture_output=True,
        text=True,
        check=True,
    )
    functions, _, listing = done.stdout.partition("\n\n")
    names = [line.split()[-1] for line in functions.splitlines()]
    first, *_, last = (names.index(name) for name in ("open_store", "collate", "finish_step"))
    assert first < names.index("SFTModule.compute_loss") < last
    *files, total = listing.splitlines()
    match = re.fullmatch(r" *(\d+) lines in (\d+) files", total)
    assert match is not None
    lines, count = map(int, match.groups())
    assert count == len(files) <= 12, done.stdout
    assert 500 < lines <= 2000
    page = walk.PAGE.read_text(encoding="utf-8")
    for line in files:
        assert f"](../{line.split()[-1]}" in page, line
