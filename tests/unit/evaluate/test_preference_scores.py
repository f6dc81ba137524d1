"""Preferences, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch

from minigpt.data.tokenizer import load
from minigpt.errors import ModelError
from minigpt.evaluate.preferences import prefer
from minigpt.infer.engine import Engine

PAIRS = [
    {"prompt": "the cat", "chosen": "sat on the mat", "rejected": "sat"},
    {"prompt": "the dog", "chosen": "sat", "rejected": "log log the log"},
    {"prompt": "a dog", "chosen": "the log", "rejected": "the mat"},
]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return str(file)


def engine(tmp_path: Path, seed: int, **changes: int) -> Engine:
    return Engine(tiny.model("qwen3", seed, **changes), load(tiny.tokenizer(tmp_path / "tok")))


def answers(model: Engine) -> list[list[torch.Tensor]]:
    """Log-probabilities [tokens, V] at the tokens of each pair's answers, and those tokens."""
    scores = []
    for row in PAIRS:
        ask = model.codec.encode(  # type: ignore[union-attr]
            [f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"]
        )[0]
        pair = []
        for side in ("chosen", "rejected"):
            answer = model.codec.encode([f"{row[side]}<|im_end|>"])[0]  # type: ignore[union-attr]
            with torch.no_grad():
                logits = model.model(torch.tensor([ask + answer])).logits[0, len(ask) - 1 : -1]
            pair.append((logits.log_softmax(-1), torch.tensor(answer)))
        scores.append(pair)
    return scores


def logp(logits: torch.Tensor, answer: torch.Tensor) -> float:
    return float(logits.gather(1, answer[:, None]).sum())


def test_preferences_without_a_reference(tmp_path: Path, pairs: str) -> None:
    model = engine(tmp_path, 0)
    scored = answers(model)
    margins = [logp(*chosen) - logp(*rejected) for chosen, rejected in scored]
    lengths = [(len(c[1]), len(r[1])) for c, r in scored]
    scores = prefer(model, pairs, 512)
    assert scores["margin"].value == pytest.approx(sum(margins) / 3, abs=1e-4)
    assert scores["accuracy"].value == pytest.approx(sum(m > 0 for m in margins) / 3)
    assert scores["accuracy, better is shorter"].value == float(margins[1] > 0)
    assert scores["accuracy, better is longer"].value == float(margins[0] > 0)
    assert scores["tokens of the better answer"].value == sum(c for c, _ in lengths) / 3
    assert scores["tokens of the worse answer"].value == sum(r for _, r in lengths) / 3
    both = torch.tensor([margins, [c - r for c, r in lengths]])
    assert scores["margin and length"].value == pytest.approx(
        float(both.corrcoef()[0, 1]), abs=1e-4
    )
    assert "KL per token" not in scores


def test_rewards_and_divergence_from_a_reference(tmp_path: Path, pairs: str) -> None:
    model, reference = engine(tmp_path, 0), engine(tmp_path, 1)
    ours, theirs = answers(model), answers(reference)
    ratios = [
        [logp(*a) - logp(*b) for a, b in zip(x, y, strict=True)]
        for x, y in zip(ours, theirs, strict=True)
    ]
    divergence = [
        float((a.exp() * (a - b)).sum())
        for x, y in zip(ours, theirs, strict=True)
        for (a, _), (b, _) in zip(x, y, strict=True)
    ]
    tokens = sum(len(answer) for pair in ours for _, answer in pair)
    scores = prefer(model, pairs, 512, reference, beta=0.5)
    assert scores["margin"].value == pytest.approx(
        sum(0.5 * (c - r) for c, r in ratios) / 3, abs=1e-4
    )
    assert scores["accuracy"].value == pytest.approx(sum(c > r for c, r in ratios) / 3)
    assert scores["KL per token"].value == pytest.approx(sum(divergence) / tokens, rel=1e-4)
    assert scores["KL per token"].n == tokens
    same = prefer(model, pairs, 512, model)
    assert same["KL per token"].value == 0.0 == same["margin"].value
    assert "margin and length" not in same
    assert not math.isnan(scores["margin and length"].value)


def test_a_reference_with_other_tokens_is_refused(tmp_path: Path, pairs: str) -> None:
    model = engine(tmp_path, 0)
    other = Engine(tiny.model("llama"), load(tiny.tokenizer(tmp_path / "plain", template=False)))
    with pytest.raises(ModelError, match="other tokens"):
        prefer(model, pairs, 512, other)
    wider = engine(tmp_path, 0, vocab_size=tiny.VOCABULARY + 8)  # rows that no token has
    with pytest.raises(ModelError, match="other tokens"):
        prefer(model, pairs, 512, wider)
