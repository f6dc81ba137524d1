"""What only a GPU can show: the stages train there as they do on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import Fit
from torch._dynamo.utils import counters

pytestmark = pytest.mark.gpu
GPU = {"trainer__accelerator": "gpu", "trainer__max_steps": 6}


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_losses_are_those_of_the_cpu(stage: str, fit: Fit, tmp_path: Path) -> None:
    fit(stage, "cpu", trainer__max_steps=6)
    cli = fit(stage, "gpu", **GPU)
    assert cli.trainer.strategy.root_device.type == "cuda"
    assert cli.datamodule.readers == 2
    cpu, gpu = (tiny_runs.metrics(tmp_path / name) for name in ("cpu", "gpu"))
    assert gpu == pytest.approx(cpu, rel=2e-3)
    assert json.loads((tmp_path / "gpu" / "summary.json").read_text())["peak_gpu_mb"] > 0


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_bf16_trains_alike(stage: str, fit: Fit, tmp_path: Path) -> None:
    fit(stage, "cpu", trainer__max_steps=6)
    fit(stage, "gpu", trainer__precision="bf16-mixed", **GPU)
    cpu, gpu = (tiny_runs.metrics(tmp_path / name) for name in ("cpu", "gpu"))
    assert gpu == pytest.approx(cpu, rel=0.05)


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_fp16_trains_alike(stage: str, fit: Fit, tmp_path: Path) -> None:
    """Its scaler leaves a step or two out before it has found a scale."""
    fit(stage, "cpu", trainer__max_steps=6)
    fit(stage, "gpu", trainer__precision="16-mixed", **{**GPU, "trainer__max_steps": 8})
    cpu, gpu = (tiny_runs.metrics(tmp_path / name) for name in ("cpu", "gpu"))
    assert min(gpu) == pytest.approx(min(cpu), rel=0.15)


@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_a_compiled_run_goes_on_where_it_was(stage: str, fit: Fit, tmp_path: Path) -> None:
    """The kernel adds up gradients in no fixed order, so nearly, not exactly."""
    torch._dynamo.reset()
    counters.clear()
    changes: dict[str, Any] = {"trainer__precision": "bf16-mixed", **GPU}
    changes["model__init_args__compile_layers"] = True
    fit(stage, "whole", **changes)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    fit(stage, "cut", **{**changes, "trainer__max_steps": 3})
    fit(stage, "cut", "--ckpt_path", "auto", **changes)
    whole, cut = (tiny_runs.metrics(tmp_path / name) for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, rel=0.01)


def test_the_hardware_is_found(fit: Fit) -> None:
    cli = fit("sft", trainer__accelerator="auto", trainer__precision=None, trainer__max_steps=2)
    assert cli.trainer.strategy.root_device.type == "cuda"
    assert cli.trainer.precision == "bf16-mixed"
