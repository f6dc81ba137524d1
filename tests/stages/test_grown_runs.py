"""Pretraining whose layers join one after the other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Fit, metrics

from minigpt.errors import ConfigError
from minigpt.model.pretrained import load_model
from minigpt.runs.checkpoints import STATE

GROW = "model__init_args__grow"


def second_layer(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    file = run_dir / "checkpoints" / f"step={step}" / STATE
    state: dict[str, Any] = torch.load(file, weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if ".layers.1." in name}


def test_a_layer_sleeps_until_its_step_and_trains_from_then_on(fit: Fit, tmp_path: Path) -> None:
    each: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 9}, "trainer__max_steps": 4}
    fit("pretrain", **{GROW: {"layers": 1, "steps": 2}}, **each)
    first, second, third, last = (second_layer(tmp_path / "run", step) for step in (1, 2, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    asleep = ("o_proj.weight", "down_proj.weight")
    for name in first:
        assert bool(second[name].any()) is not name.endswith(asleep)
        assert bool(third[name].any()), name
        assert not torch.equal(last[name], second[name]), name


def test_a_grown_model_is_exported_whole(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        cli = fit("pretrain", **{GROW: {"layers": 1, "steps": 2}})
    assert "The first 1 of 2 layers train alone for 2 steps." in caplog.text
    model = load_model(tmp_path / "run")
    assert len(model.base_model.layers) == model.config.num_hidden_layers == 2
    own = cli.model.model.hf.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    losses = metrics(tmp_path / "run")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("growth", "why"),
    [
        ({"layers": 1, "steps": 3}, r"grow\.steps is 3, but the run has 3 steps"),
        ({"layers": 2, "steps": 2}, r"grow\.layers is 2, but the model has 2 layers"),
    ],
)
def test_a_run_that_would_not_grow_is_refused_before_another_is_overwritten(
    growth: dict[str, int], why: str, fit: Fit, tmp_path: Path
) -> None:
    fit("pretrain")
    with pytest.raises(ConfigError, match=why):
        fit("pretrain", "run", "--overwrite", "true", **{GROW: growth})
    assert load_model(tmp_path / "run")


def test_growth_is_for_random_weights(fit: Fit, world: Path) -> None:
    start: dict[str, Any] = {"model__init_args__init_from": str(world / "pretrain")}
    with pytest.raises(ConfigError, match="leave it or init_from out"):
        fit("pretrain", **{GROW: {"layers": 1, "steps": 2}}, **start)
