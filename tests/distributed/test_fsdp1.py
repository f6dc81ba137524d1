"""FSDP1, for fp16, which FSDP2 does not train in. On a CPU it runs with one process at most."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from minigpt.cli.trainer import run
from minigpt.model.pretrained import load_model

FSDP1 = {"trainer__strategy": {"class_path": "minigpt.model.parallel.FSDP1"}}
DRIVER = Path(__file__).with_name("driver.py")
STAGES = ("pretrain", "lora", "dpo")


def launch(root: Path, jobs: list[list[str]]) -> None:
    file = root / "jobs.json"
    file.write_text(json.dumps([{"args": args, "sgd": False} for args in jobs]))
    start = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
    command = [sys.executable, *start, str(DRIVER), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def assert_same_weights(one: Path, other: Path) -> None:
    weights = load_model(other).state_dict()
    for name, weight in load_model(one).state_dict().items():
        assert torch.allclose(weights[name], weight, rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "32-true"),
        pytest.param("gpu", "32-true", marks=pytest.mark.gpu),
        pytest.param("gpu", "16-mixed", marks=pytest.mark.gpu),
    ],
)
def test_it_trains_as_one_process_and_goes_on(device: str, precision: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    root = tiny_runs.write_data(tmp_path)
    for before in ("pretrain", "sft"):
        run(tiny_runs.arguments("fit", tiny_runs.config(root, before, root / before)))
    changes: dict[str, Any] = {
        "trainer__max_steps": 4,
        "trainer__accelerator": device,
        "trainer__precision": precision,
        "checkpoint": {"every": 2, "keep": 5},
        "model__init_args__optimizer": {"lr": 0.01, "weight_decay": 3.0},
    }
    jobs = []
    for stage in STAGES:
        plain = tiny_runs.config(root, stage, root / f"{stage}-plain", **changes)
        run(tiny_runs.arguments("fit", plain))
        flat = tiny_runs.config(root, stage, root / f"{stage}-flat", **FSDP1, **changes)
        jobs.append(tiny_runs.arguments("fit", flat))
    launch(root, jobs)
    for stage in STAGES:
        shutil.copytree(root / f"{stage}-flat", root / f"{stage}-whole")
        assert_same_weights(root / f"{stage}-plain", root / f"{stage}-whole")
        shutil.rmtree(root / f"{stage}-flat" / "checkpoints" / "step=4")
    launch(root, [[*args, "--ckpt_path", "auto"] for args in jobs])
    for stage in STAGES:
        assert_same_weights(root / f"{stage}-whole", root / f"{stage}-flat")
