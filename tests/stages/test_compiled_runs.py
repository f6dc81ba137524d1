"""Whether a run compiles its layers, and what computes its attention, is part of its state."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_runs import Fit

from minigpt.errors import ConfigError
from minigpt.model import fused
from minigpt.model.lm import PackedLM

COMPILE = "model__init_args__compile_layers"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[PackedLM]:
    """Note which models are to be compiled, and leave them as they are."""
    noted: list[PackedLM] = []
    monkeypatch.setattr("minigpt.modules.base.compile_model", lambda lm, *_: noted.append(lm))
    return noted


def test_a_run_goes_on_compiled_as_it_began(fit: Fit, compiled: list[PackedLM]) -> None:
    fit("sft", trainer__max_steps=2)
    assert compiled == []
    fit("sft", "compiled", trainer__max_steps=2, **{COMPILE: True})
    cli = fit("sft", "compiled", "--ckpt_path", "auto", trainer__max_steps=3)
    assert len(compiled) == 2
    assert compiled[1] is cli.model.model


def test_a_run_can_be_told_otherwise(
    fit: Fit, compiled: list[PackedLM], caplog: pytest.LogCaptureFixture
) -> None:
    fit("sft", trainer__max_steps=2, **{COMPILE: True})
    fit("sft", "run", "--ckpt_path", "auto", trainer__max_steps=3, **{COMPILE: False})
    assert len(compiled) == 1
    assert "compiled: True before, False now" in caplog.text


def test_the_reference_is_compiled_like_the_model(fit: Fit, compiled: list[PackedLM]) -> None:
    cli = fit("dpo", trainer__max_steps=2, **{COMPILE: True})
    assert compiled == [cli.model.model, *cli.model._frozen]
    assert len(compiled) == 2


def test_activations_are_not_computed_again_by_compiled_layers(fit: Fit) -> None:
    both: dict[str, Any] = {COMPILE: True, "model__init_args__activation_checkpointing": True}
    with pytest.raises(ConfigError, match="exclude each other"):
        fit("sft", **both)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_run_that_loses_its_kernel_says_so(
    precision: str, fit: Fit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "available", lambda: True)  # too narrow heads to really use it
    fit("sft", trainer__max_steps=2, trainer__precision=precision)
    monkeypatch.setattr(fused, "available", lambda: False)
    fit("sft", "run", "--ckpt_path", "auto", trainer__max_steps=3, trainer__precision=precision)
    told = "attention: kernel before, plain now" in caplog.text
    assert told is precision.startswith("bf16")
