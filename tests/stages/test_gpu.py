"""What only a GPU can show: the stages train there as they do on a CPU."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import Fit
from torch._dynamo.utils import counters

GPU = {"trainer__accelerator": "gpu", "trainer__max_steps": 6}


@pytest.mark.gpu
@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_losses_are_those_of_the_cpu(stage: str, fit: Fit, tmp_path: Path) -> None:
    fit(stage, "cpu", trainer__max_steps=6)
    cli = fit(stage, "gpu", **GPU)
    assert cli.trainer.strategy.root_device.type == "cuda"
    assert cli.datamodule.worker_count == 2
    cpu, gpu = (tiny_runs.metrics(tmp_path / name) for name in ("cpu", "gpu"))
    assert gpu == pytest.approx(cpu, rel=2e-3)
    assert json.loads((tmp_path / "gpu" / "summary.json").read_text())["peak_gpu_mb"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_bf16_trains_alike(stage: str, fit: Fit, tmp_path: Path) -> None:
    fit(stage, "cpu", trainer__max_steps=6)
    fit(stage, "gpu", trainer__precision="bf16-mixed", **GPU)
    cpu, gpu = (tiny_runs.metrics(tmp_path / name) for name in ("cpu", "gpu"))
    assert gpu == pytest.approx(cpu, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_fp16_trains_alike(stage: str, fit: Fit, tmp_path: Path) -> None:
    """Its scaler leaves a step or two out before it has found a scale."""
    fit(stage, "cpu", trainer__max_steps=6)
    fit(stage, "gpu", trainer__precision="16-mixed", **{**GPU, "trainer__max_steps": 8})
    cpu, gpu = (tiny_runs.metrics(tmp_path / name) for name in ("cpu", "gpu"))
    assert min(gpu) == pytest.approx(min(cpu), rel=0.15)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_fp16_measures_the_gradients_of_fp32(stage: str, fit: Fit, tmp_path: Path) -> None:
    fit(stage, "wide", **GPU)
    fit(stage, "half", trainer__precision="16-mixed", **GPU)
    wide, half = (tiny_runs.metrics(tmp_path / name, "grad_norm") for name in ("wide", "half"))
    first = next(
        norm for norm in half if math.isfinite(norm)
    )  # of the weights that wide began with
    assert first == pytest.approx(wide[0], rel=0.05)


@pytest.mark.gpu
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
    uninterrupted, cut = (tiny_runs.metrics(tmp_path / name) for name in ("whole", "cut"))
    assert cut == pytest.approx(uninterrupted, rel=0.01)


@pytest.mark.filterwarnings("ignore")  # operations that have no deterministic kernel are named
@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16-mixed"), pytest.param("gpu", "bf16-mixed", marks=pytest.mark.gpu)],
)
def test_a_deterministic_run_goes_on_exactly(
    device: str,
    precision: str,
    stage: str,
    fit: Fit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    changes: dict[str, Any] = {
        "trainer__accelerator": device,
        "trainer__precision": precision,
        "trainer__deterministic": True,
        "trainer__max_steps": 6,
        "checkpoint": {"every": 3, "keep": 5},
    }
    fit(stage, "whole", **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step=6")
    fit(stage, "cut", "--ckpt_path", "auto", **changes)
    uninterrupted, cut = (tiny_runs.metrics(tmp_path / name) for name in ("whole", "cut"))
    assert cut == uninterrupted


@pytest.mark.gpu
def test_the_hardware_is_found(fit: Fit) -> None:
    cli = fit("sft", trainer__accelerator="auto", trainer__precision=None, trainer__max_steps=2)
    assert cli.trainer.strategy.root_device.type == "cuda"
    assert cli.trainer.precision == "bf16-mixed"
