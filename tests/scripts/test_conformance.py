"""The table of model types: what it says of a dozen of them, and of all."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "conformance.py"))
PACKED, ROWS = SCRIPT["PACKED"], SCRIPT["ROWS"]
DOZEN = {
    "llama": PACKED,
    "qwen2": PACKED,
    "qwen3": PACKED,
    "gemma2": PACKED,
    "gemma3_text": PACKED,
    "gpt2": PACKED,
    "gpt_oss": PACKED,
    "deepseek_v3": PACKED,
    "lfm2": ROWS,
    "mamba": ROWS,
    "qwen3_next": ROWS,
    "bloom": ROWS,
}


@pytest.mark.parametrize("kind", DOZEN)
def test_a_dozen_types_are_equal(kind: str) -> None:
    row = SCRIPT["examine"](kind)
    assert (row.result, row.decoding) == (DOZEN[kind], "equal"), row.why


def test_what_hangs_or_dies_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(kind: str, to: Any) -> None:
        if kind == "dies":
            raise SystemExit(3)
        if kind == "hangs":
            time.sleep(600)
        to.send((kind, PACKED, "equal"))

    monkeypatch.setitem(SCRIPT["rows"].__globals__, "_work", work)
    table = list(SCRIPT["rows"](["dies", "hangs", "works"], 2, 5))
    assert [row.why for row in table] == ["its process died", "no answer in 5 s", ""]
    text = SCRIPT["page"](table)
    assert "3 types: **1** equal, packed, **0** equal, one sample a row" in text
    assert "| works | equal, packed | equal |  |" in text


@pytest.mark.large
@pytest.mark.timeout(7200)
def test_no_type_is_wrong() -> None:
    kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    table = list(SCRIPT["rows"](kinds, 2, 300))
    assert [row.kind for row in table] == kinds
    assert not [row for row in table if row.result == SCRIPT["WRONG"]]
    (ROOT / "docs" / "models.md").write_text(SCRIPT["page"](table), encoding="utf-8")
