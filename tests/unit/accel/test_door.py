"""The switch, and the reference path against the fast one."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from minigpt import accel
from minigpt.data.batch import PackedBatch, collate
from minigpt.errors import ConfigError
from minigpt.model.packed_lm import PackedLM

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {}),
    ("gpt2", {}),
    ("mistral", {"sliding_window": 5}),
    ("gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 5}),
    ("gpt_oss", {"sliding_window": 5}),
]


def results(lm: PackedLM, batch: PackedBatch, per_answer: bool) -> list[Tensor]:
    value = lm(batch, per_answer)
    weights = torch.linspace(1, 2, value.numel()).view(value.shape)
    gradients = torch.autograd.grad((value * weights).sum(), [*lm.parameters()])
    return [value.detach(), *gradients]


@pytest.mark.parametrize(("family", "changes"), MODELS)
@pytest.mark.parametrize("per_answer", [False, True])
def test_switched_off_the_numbers_are_the_same(
    family: str, changes: dict[str, Any], per_answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate([*tiny.preferences([(9, 5, 14), (3, 1, 2)]), *tiny.texts([20, 1, 7])])
    fast = results(PackedLM(tiny.model(family, **changes)), batch, per_answer)
    monkeypatch.setattr(accel, "ENABLED", False)
    lm = PackedLM(tiny.model(family, **changes))
    assert lm.linear_head is None
    for ours, theirs in zip(fast, results(lm, batch, per_answer), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_switched_off_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accel, "ENABLED", False)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    accel.compile_model(PackedLM(tiny.model("llama")), 256, 256, torch.no_grad)
    assert caplog.messages == ["Not compiled, as MINIGPT_ACCEL=off."]
    trainer: Any = None
    assert not accel.compiling_pays(trainer, torch.nn.Linear(1, 1), 10**9)
    assert accel.attention_name(bf16_on_cpu=True) == "reference"


def test_the_switch_is_on_or_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(accel.SWITCH, "0")
    with pytest.raises(ConfigError, match="MINIGPT_ACCEL must be on or off, but is 0"):
        accel.read_switch()
