"""Damaged files of items and of texts are read, or refused in one paragraph."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import damage
from hypothesis import strategies as st

from minigpt.errors import DataError
from minigpt.evaluate.exam import load_items
from minigpt.evaluate.likelihood import documents

ASKED = [{"role": "user", "content": "a"}]
ROWS: list[dict[str, Any]] = [
    {"id": "1", "family": "x", "messages": ASKED, "answer": "b", "avoid": ["c"]},
    {"prompt": "a", "choices": ["b", "c"], "answer": 1},
    {"good": "a b", "bad": "b a"},
    {"text": "a"},
]


@damage.counts
def test_damaged_items(tmp_path: Path, count: int) -> None:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    damaged = st.one_of(*map(damage.damaged_json, ROWS), damage.damaged_bytes(lines))

    def read(content: bytes) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_bytes(content)
        for kind in ("exam", "choices", "pairs"):
            with suppress(DataError):
                load_items(file, kind)  # type: ignore[arg-type]
        (tmp_path / "a.txt").write_bytes(content)
        with suppress(DataError):
            list(documents(str(tmp_path / "a.txt")))
        list(documents(str(file)))

    damage.assert_read_or_refused(count, damaged, read)
