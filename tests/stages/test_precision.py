"""Weights in bf16, which Lightning converts each batch for."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import Fit


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_weights_in_bf16_train_alike(stage: str, fit: Fit, tmp_path: Path) -> None:
    fit(stage, "wide", trainer__max_steps=4)
    fit(stage, "half", trainer__max_steps=4, trainer__precision="bf16-true")
    wide, half = (tiny_runs.metrics(tmp_path / name) for name in ("wide", "half"))
    assert half != wide
    assert half == pytest.approx(wide, rel=0.05)
