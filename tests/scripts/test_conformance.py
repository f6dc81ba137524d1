"""The table of model types: what it says of a dozen of them, and of all."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minigpt.model.conformance import Conformance
from minigpt.model.lora import Lora

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "conformance.py"))
PACKED, ROWS = SCRIPT["PACKED"], SCRIPT["ROWS"]
PADDED, SAME_LENGTH, UNCACHED = (
    SCRIPT["MODES"][mode] for mode in ("padded", "same_length", "uncached")
)
DOZEN = {
    "llama": (PACKED, PADDED),
    "qwen2": (PACKED, PADDED),
    "qwen3": (PACKED, PADDED),
    "gemma2": (PACKED, PADDED),
    "gemma3_text": (PACKED, PADDED),
    "gpt2": (PACKED, PADDED),
    "gpt_oss": (PACKED, PADDED),
    "deepseek_v3": (PACKED, PADDED),
    "lfm2": (ROWS, SAME_LENGTH),
    "mamba": (ROWS, SAME_LENGTH),
    "roberta": (ROWS, SAME_LENGTH),
    "rwkv": (ROWS, UNCACHED),
    "bloom": (ROWS, PADDED),
}


@pytest.mark.parametrize("kind", DOZEN)
def test_a_dozen_types_are_equal(kind: str) -> None:
    row = SCRIPT["examine"](kind)
    assert (row.result, row.decoding) == DOZEN[kind], row.why
    assert row.lora == "equal"


@torch.no_grad()
def test_what_is_decoded_otherwise_than_alone_shows() -> None:
    config = SCRIPT["config_of"]("roberta")
    model = SCRIPT["small_model"](config).eval()
    assert not SCRIPT["decoding_differs"](model, Conformance("", "eager", "same_length"))
    assert SCRIPT["decoding_differs"](model, Conformance("", "eager", "padded"))


def test_an_adapter_that_is_refused_or_merged_wrongly_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = SCRIPT["lora_result"].__globals__
    model = SCRIPT["small_model"](SCRIPT["config_of"]("qwen2"))
    monkeypatch.setitem(names, "Lora", lambda: Lora(target_modules=["router"]))
    assert SCRIPT["lora_result"](model).startswith("refused: LoRA cannot be put on router")
    monkeypatch.setitem(names, "Lora", Lora)
    monkeypatch.setitem(names, "merge", lambda adapted: adapted.unload())
    assert SCRIPT["lora_result"](model) == SCRIPT["WRONG"]


def test_what_hangs_or_dies_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(kind: str, to: Any) -> None:
        if kind == "dies":
            raise SystemExit(3)
        if kind == "hangs":
            time.sleep(600)
        to.send((kind, PACKED, "equal", "", "refused: why"))

    monkeypatch.setitem(SCRIPT["rows"].__globals__, "_send_row", work)
    table = list(SCRIPT["rows"](["dies", "hangs", "works"], 2, 5))
    assert [row.why for row in table] == ["its process died", "no answer in 5 s", ""]
    text = SCRIPT["page"](table)
    assert "3 types: **1** equal, packed, **0** equal, one sample a row" in text
    assert "| works | equal, packed | equal | refused: why |  |" in text


@pytest.mark.large
@pytest.mark.timeout(7200)
def test_no_type_is_wrong() -> None:
    kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    table = list(SCRIPT["rows"](kinds, 2, 300))
    assert [row.kind for row in table] == kinds
    assert not [row for row in table if SCRIPT["WRONG"] in (row.result, row.lora)]
    (ROOT / "docs" / "models.md").write_text(SCRIPT["page"](table), encoding="utf-8")
