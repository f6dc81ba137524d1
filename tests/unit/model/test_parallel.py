"""Which strategy shards a model, and what of a flattened weight is still known."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy

from minigpt.errors import ConfigError
from minigpt.model.optimizer import OptimizerOptions, build_optimizer
from minigpt.model.parallel import FSDP1, FSDP2, check_strategy, sharding


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("32-true", FSDP2), ("bf16-mixed", FSDP2), ("bf16-true", FSDP2), ("16-mixed", FSDP1)],
)
def test_fsdp_is_fsdp2_but_in_fp16(
    precision: str, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert type(sharding(precision)) is kind
    (line,) = caplog.messages
    assert line.startswith(f"Strategy: {kind.__name__}")


def test_lightnings_own_sharding_is_refused() -> None:
    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(ConfigError, match=r"Set trainer.strategy to fsdp"):
            check_strategy(strategy)
    for strategy in (FSDP1(), FSDP2(), DDPStrategy(), SimpleNamespace()):
        check_strategy(strategy)


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)]
)
def test_fsdp1_leaves_rotary_frequencies_in_fp32(precision: Any, dtype: torch.dtype) -> None:
    config = FSDP1(precision_plugin=FSDPPrecision(precision)).mixed_precision_config
    assert config is not None
    assert config.buffer_dtype == torch.float32
    assert config.param_dtype == config.reduce_dtype == dtype


def test_flattened_matrices_are_decayed(monkeypatch: pytest.MonkeyPatch) -> None:
    def flatten(_: FSDPStrategy, trainer: Any) -> None:
        for weight in trainer.lightning_module.parameters():
            weight.data = weight.data.flatten()

    model = tiny.model("qwen3")
    matrices = {id(weight) for weight in model.parameters() if weight.ndim == 2}
    monkeypatch.setattr(FSDPStrategy, "setup", flatten)
    trainer: Any = SimpleNamespace(lightning_module=model)
    FSDP1().setup(trainer)
    assert {weight.ndim for weight in model.parameters()} == {1}
    optimizer = build_optimizer(model, OptimizerOptions(weight_decay=0.5))
    decayed = {
        id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.5 for p in g["params"]
    }
    assert decayed == matrices
