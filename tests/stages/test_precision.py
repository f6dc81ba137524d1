"""Half precision: weights in bf16; fp16 with a scaler, here on the CPU as on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from tiny_runs import Fit

from minigpt.errors import ConfigError, TrainingError
from minigpt.model.pretrained import load_model
from minigpt.stages.base import LossSums
from minigpt.stages.sft import SFTModule

Scaler = Callable[[float], None]


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_weights_in_bf16_train_alike(
    stage: str, fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(stage, "wide", trainer__max_steps=4)
    assert "bf16-true" not in caplog.text
    fit(stage, "half", trainer__max_steps=4, trainer__precision="bf16-true")
    wide, half = (tiny_runs.metrics(tmp_path / name) for name in ("wide", "half"))
    assert half != wide
    assert half == pytest.approx(wide, rel=0.05)
    assert "less than 1/512 of a weight is lost" in caplog.text


def test_weights_in_fp16_are_refused(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"16-true .* Train in 16-mixed, bf16-mixed or bf16-true"):
        fit("sft", trainer__precision="16-true")
    assert not (tmp_path / "run" / "checkpoints").exists()


# fp16


@pytest.fixture
def fp16(monkeypatch: pytest.MonkeyPatch) -> Scaler:
    """Train in 16-mixed, which Lightning does not do on CPUs: `fp16(first scale)`."""

    def use(scale: float) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        monkeypatch.setattr(_AcceleratorConnector, "_check_and_init_precision", lambda _: plugin)

    return use


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Let the gradients of some steps, numbered from 0, overflow."""

    def at(steps: range) -> None:
        compute_loss = SFTModule.compute_loss

        def overflowing(module: Any, batch: Any) -> LossSums:
            sums = compute_loss(module, batch)
            if sums.loss.requires_grad and module.trainer.global_step in steps:
                sums.loss.register_hook(lambda gradient: gradient * math.inf)
            return sums

        monkeypatch.setattr(SFTModule, "compute_loss", overflowing)

    return at


def optimizer(name: str) -> dict[str, Any]:
    return {"name": name, "lr": 0.01, "adamw_lr": 0.01}


@pytest.mark.parametrize("clipping", [(0.1, "norm"), (1e-3, "value"), (0.0, "norm")])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_fp16_takes_the_steps_of_fp32(
    name: str, clipping: tuple[float, str], fit: Fit, fp16: Scaler, world: Path, tmp_path: Path
) -> None:
    changes = {
        "model__init_args__optimizer": optimizer(name) | {"eps": 1e-3},  # so that AdamW sees sizes
        "trainer__gradient_clip_val": clipping[0],
        "trainer__gradient_clip_algorithm": clipping[1],
    }
    fit("sft", "wide", **changes)
    fp16(2.0**12)
    cli = fit("sft", "half", **changes)
    assert cli.trainer.precision == "16-mixed"
    assert cli.trainer.precision_plugin.scaler.get_scale() == 2.0**12
    for metric in ("train/loss", "grad_norm"):
        wide, half = (tiny_runs.metrics(tmp_path / run, metric) for run in ("wide", "half"))
        assert half == pytest.approx(wide, rel=0.02)
    start = load_model(world / "pretrain").state_dict()
    half = load_model(tmp_path / "half").state_dict()
    for weight, wide_one in load_model(tmp_path / "wide").state_dict().items():
        moved = (wide_one - start[weight]).norm()
        assert (half[weight] - wide_one).norm() <= 0.2 * moved, weight


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_fp16_leaves_a_step_out_whose_loss_jumps(
    name: str, fit: Fit, fp16: Scaler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("minigpt.stages.step.LossWatch.observe", lambda *_: True)
    fp16(2.0**12)
    changes = {"model__init_args__optimizer": optimizer(name)}
    cli = fit("sft", model__init_args__spike={"action": "skip"}, **changes)
    start, end = (load_model(cli.model.start.init_from), load_model(tmp_path / "run"))
    for weight, value in end.state_dict().items():
        assert torch.equal(value, start.state_dict()[weight]), weight


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_fp16_goes_on_after_an_overflow(
    name: str, fit: Fit, fp16: Scaler, overflow: Callable[[range], None], tmp_path: Path
) -> None:
    fp16(2.0**12)
    overflow(range(1, 3))
    cli = fit("sft", model__init_args__optimizer=optimizer(name), trainer__max_steps=5)
    assert cli.trainer.precision_plugin.scaler.get_scale() == 2.0**10
    norms = tiny_runs.metrics(tmp_path / "run", "grad_norm")
    assert len(norms) == 3
    assert all(math.isfinite(norm) for norm in norms)
    assert len(tiny_runs.metrics(tmp_path / "run")) == 5


def test_a_scale_that_collapses_stops_the_run(
    fit: Fit, fp16: Scaler, overflow: Callable[[range], None]
) -> None:
    fp16(4.0)
    overflow(range(1, 99))
    with pytest.raises(TrainingError, match=r"^Step 4: .* fp16 even at a loss scale of 1; .*jsonl"):
        fit("sft", trainer__max_steps=50)
