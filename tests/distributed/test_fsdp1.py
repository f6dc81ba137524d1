"""FSDP1, which refuses CPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch
from patience import limit

from minigpt.cli import run
from minigpt.model.saved import load_model

ONE = {"trainer__accelerator": "gpu", "trainer__devices": 1}


def launch(*command: str) -> None:
    started = [sys.executable, "-m", "minigpt", *command]
    done = subprocess.run(started, capture_output=True, text=True, check=False, timeout=limit(300))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["pretrain", "lora", "dpo"])
def test_fsdp1_trains_as_one_process(stage: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    root = tiny_runs.write_data(tmp_path)
    for before in ("pretrain", "sft"):
        run(tiny_runs.arguments("fit", tiny_runs.config(root, before, root / before)))
    plain, sharded = root / f"{stage}-plain", root / f"{stage}-fsdp"
    run(tiny_runs.arguments("fit", tiny_runs.config(root, stage, plain, **ONE)))
    fsdp = {**ONE, "trainer__strategy": "fsdp"}
    launch(*tiny_runs.arguments("fit", tiny_runs.config(root, stage, sharded, **fsdp)))
    expected = tiny_runs.metrics(plain)
    assert tiny_runs.metrics(sharded) == pytest.approx(expected, rel=1e-3)
    weights = load_model(sharded).state_dict()
    for name, weight in load_model(plain).state_dict().items():
        assert torch.allclose(weights[name], weight, rtol=1e-3, atol=1e-4), name
