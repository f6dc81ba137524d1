"""Runs that several tests look at: each stage once, from the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from minigpt.cli.trainer import MiniGPTCLI, run


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two threads would wait for each other longer than tiny models compute."""
    torch.set_num_threads(1)


def _fit(root: Path, stage: str, run_dir: Path, *more: str, **changes: Any) -> MiniGPTCLI:
    config = tiny_runs.config(root, stage, run_dir, **changes)
    return run(tiny_runs.arguments("fit", config, *more))


@pytest.fixture(scope="session")
def world(_one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer and a finished run of every stage: `pretrain`, `sft`, `dpo`, `lora`."""
    root = tiny_runs.write_data(tmp_path_factory.mktemp("world"))
    for stage in tiny_runs.STAGES:
        _fit(root, stage, root / stage, **tiny_runs.RUN)
    return root


@pytest.fixture
def fit(world: Path, tmp_path: Path) -> tiny_runs.Fit:
    """Run a stage: `fit("sft", "name of the run", "--more", ..., dotted__path=value)`."""

    def start(stage: str, name: str = "run", *more: str, **changes: Any) -> MiniGPTCLI:
        return _fit(world, stage, tmp_path / name, *more, **changes)

    return start


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with plain SGD: AdamW and Muon would hide a wrong scale of the gradients."""

    def build(model: torch.nn.Module, options: Any) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.2)

    monkeypatch.setattr("minigpt.stages.setup.build_optimizer", build)
