"""Strategies for several processes also run with one: on a GPU over NCCL, on a CPU over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch

from minigpt.cli.trainer import run

DRIVER = Path(__file__).with_name("driver.py")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_one_process_trains_as_one_device(device: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    root = tiny_runs.write_data(tmp_path)
    options = {"trainer__accelerator": device}
    run(tiny_runs.arguments("fit", tiny_runs.config(root, "pretrain", root / "alone", **options)))
    jobs = []
    for name, strategy, steps in (("ddp", "ddp", 3), ("fsdp", "fsdp", 3), ("longer", "ddp", 5)):
        changes = {**options, "trainer__strategy": strategy, "trainer__max_steps": steps}
        config = tiny_runs.config(root, "pretrain", root / name, **changes)
        jobs.append({"args": tiny_runs.arguments("fit", config), "sgd": False})
    file = root / "jobs.json"
    file.write_text(json.dumps(jobs))
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    command = [sys.executable, *start, str(DRIVER), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    for strategy in ("ddp", "fsdp"):
        assert tiny_runs.metrics(root / strategy) == pytest.approx(
            tiny_runs.metrics(root / "alone"), rel=1e-5 if device == "cpu" else 1e-3
        )
    ddp, _, longer = json.loads((root / "jobs.all_reduces.json").read_text())
    assert longer - ddp == 2  # one for each optimizer step, beside those of the gradients
