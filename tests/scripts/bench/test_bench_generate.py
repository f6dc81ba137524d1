"""Decoding is measured in all arms, and llama.cpp is left out where it cannot be measured."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import pytest
import tiny
import tiny_runs
import torch

from minigpt.model.optimizer import fast_bf16

Bench = Callable[..., Any]
SHORT = ("--tokens", "3", "--repeats", "1")


def test_every_arm_is_measured(bench: Bench, tmp_path: Path) -> None:
    size = {
        "model": {"init_args": {"architecture": tiny_runs.ARCHITECTURE | {"max_positions": 256}}}
    }
    (tmp_path / "size.yaml").write_text(json.dumps(size))
    file = tmp_path / "deep" / "result.json"
    options = ("--size", tmp_path / "size.yaml", *SHORT, "--json", file)
    outcome = bench("generate", *options)
    assert outcome.status == 0
    result = json.loads(file.read_text())
    arms = {"transformers_fp32", "fp32", "int8", "one_by_one_fp32", "batch_fp32", "gguf_q8_0"}
    arms |= {"transformers_bf16", "bf16"}
    ratios = {"ratio_fp32", "ratio_bf16", "ratio_int8", "ratio_batch", "ratio_gguf_q8_0"}
    assert {name for name in result if name.endswith("_per_s")} == {
        f"{arm}_tokens_per_s" for arm in arms
    }
    assert {name for name in result if name.startswith("ratio")} == ratios
    assert result["ratio_fp32"] == pytest.approx(
        result["fp32_tokens_per_s"] / result["transformers_fp32_tokens_per_s"], abs=0.01
    )
    assert result["gguf"] == "measured"
    assert (result["bf16"] == "in hardware") == fast_bf16(torch.device("cpu"))
    assert result["threads"] == torch.get_num_threads()
    assert f"ratio_int8{'':26} {measure.rounded(result['ratio_int8'])}\n" in outcome.out


@pytest.mark.parametrize(
    ("missing", "normalizer", "gguf"),
    [
        ("", None, "measured"),
        ("xllamacpp", None, "not measured; it needs: pip install 'minigpt[gguf]'"),
        ("", {"type": "Lowercase"}, "not measured: This tokenizer cannot be exported to GGUF"),
    ],
)
def test_a_saved_model_is_measured(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    normalizer: dict[str, str] | None,
    gguf: str,
) -> None:
    """The arm of llama.cpp is left out where it cannot be."""
    tiny.model("qwen3").save_pretrained(tmp_path)
    words = Path(tiny.tokenizer(tmp_path)) / "tokenizer.json"
    words.write_text(json.dumps(json.loads(words.read_text()) | {"normalizer": normalizer}))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *r: n != missing and find(n, *r))
    outcome = bench("generate", "--model", tmp_path, *SHORT)
    assert outcome.status == 0
    assert f"parameters{'':26} {tiny.model('qwen3').num_parameters()}" in outcome.out
    assert f"gguf{'':32} {gguf}" in outcome.out
    assert ("gguf_q8_0_tokens_per_s" in outcome.out) == (gguf == "measured")


def test_an_unknown_size_is_refused(bench: Bench) -> None:
    outcome = bench("generate", "--size", "9t")
    assert outcome.status == 2
    assert "bench: --size 9t: neither" in outcome.err
