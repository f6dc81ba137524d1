"""Weights in bf16, which Lightning converts each batch for."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import Fit

from minigpt.data.tokenizer import token_bytes


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_weights_in_bf16_train_alike(stage: str, fit: Fit, tmp_path: Path) -> None:
    fit(stage, "wide", trainer__max_steps=4)
    fit(stage, "half", trainer__max_steps=4, trainer__precision="bf16-true")
    wide, half = (tiny_runs.metrics(tmp_path / name) for name in ("wide", "half"))
    assert half != wide
    assert half == pytest.approx(wide, rel=0.05)


def test_weights_in_bf16_count_bytes_and_turn_exactly(fit: Fit) -> None:
    module = fit("pretrain", trainer__max_steps=2, trainer__precision="bf16-true").model
    assert {weight.dtype for weight in module.lm.parameters()} == {torch.bfloat16}
    assert module.token_bytes.tolist() == token_bytes(module.tokenizer)
    angles = {name: buffer for name, buffer in module.lm.named_buffers() if "inv_freq" in name}
    assert angles
    assert {buffer.dtype for buffer in angles.values()} == {torch.float32}
