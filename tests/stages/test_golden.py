"""Losses of short runs, kept in files: a change to numbers does not pass unseen.

They are compared to 1e-4 and not bit by bit: machines differ in the order of their sums
(width of vectors, matrix library), and each step builds on those before. No run starts from a
start of a start: rounding that grew over two stages would differ by as much as 1e-4.
After a change that is meant: pytest tests/stages/test_golden.py --update-golden
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from tiny_runs import Fit

from minigpt import accel

CHANGES: dict[str, dict[str, Any]] = {
    "pretrain": {"model__init_args__optimizer": {"name": "muon"}},
    "sft": {
        "trainer__accumulate_grad_batches": 2,
        "model__init_args__schedule": {"name": "cosine"},
    },
    "dpo": {},
    "lora": {},
}


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_losses_are_those_kept(
    stage: str,
    fit: Fit,
    world: Path,
    tmp_path: Path,
    repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if stage == "lora" and not accel.ENABLED:
        pytest.skip("the adapter's dropout draws for all tokens of the last layer, not for some")
    # Muon iterates in bf16 where that is fast, which is another number.
    monkeypatch.setattr("minigpt.model.optimizer.fast_bf16", lambda device: False)
    start = {} if stage == "pretrain" else {"model__init_args__init_from": str(world / "pretrain")}
    fit(stage, trainer__max_steps=8, **start, **CHANGES[stage])
    losses = tiny_runs.metrics(tmp_path / "run")
    file = repo_root / "tests" / "golden" / f"{stage}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text("".join(f"{loss:.6f}\n" for loss in losses))
    expected = [float(line) for line in file.read_text().split()]
    assert len(expected) == 8
    assert losses == pytest.approx(expected, rel=1e-4)
