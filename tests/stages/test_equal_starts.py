"""A run starts from the same weights on all hardware and in all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_runs import Fit

from minigpt.model.architecture import reproducible_init, resize_vocabulary
from minigpt.stages.base import BaseModule


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Note the weights that runs start from."""
    noted: list[dict[str, torch.Tensor]] = []

    def note(module: BaseModule) -> None:
        noted.append({name: weight.clone() for name, weight in module.state_dict().items()})

    monkeypatch.setattr(BaseModule, "on_fit_start", note)
    return noted


@contextmanager
def as_on_another_device(*_: Any, **__: Any) -> Iterator[None]:
    """What Lightning builds in on a GPU; meta stands for it."""
    with torch.device("meta"):
        yield


def assert_equal(starts: list[dict[str, torch.Tensor]]) -> None:
    first, *others = starts
    assert others
    for other in others:
        assert other.keys() == first.keys()
        for name, weight in first.items():
            assert weight.dtype == other[name].dtype
            assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize("stage", ["pretrain", "lora"])
def test_weights_do_not_depend_on_the_device(
    stage: str, fit: Fit, starts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(stage, "cpu", trainer__max_steps=2)
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", as_on_another_device)
    fit(stage, "elsewhere", trainer__max_steps=2)
    assert_equal(starts)


@pytest.mark.parametrize("stage", ["pretrain", "lora"])
def test_nor_on_what_the_process_has_drawn_before(
    stage: str, fit: Fit, starts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(stage, "one", trainer__max_steps=2)
    monkeypatch.setattr(BaseModule, "setup", lambda *_, **__: torch.rand(7))
    fit(stage, "other", trainer__max_steps=2)
    assert_equal(starts)


def test_nor_on_the_precision(fit: Fit, starts: list[Any]) -> None:
    changes = {"trainer__max_steps": 2, "model__init_args__architecture__layers": 3}
    fit("pretrain", "wide", **changes)
    fit("pretrain", "narrow", trainer__precision="bf16-true", **changes)
    starts[0] = {name: weight.bfloat16() for name, weight in starts[0].items()}
    assert_equal(starts)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["pretrain", "lora"])
def test_a_gpu_starts_as_a_cpu_does(stage: str, fit: Fit, starts: list[Any]) -> None:
    fit(stage, "cpu", trainer__max_steps=2)
    fit(stage, "gpu", trainer__max_steps=2, trainer__accelerator="gpu")
    starts[1] = {name: weight.cpu() for name, weight in starts[1].items()}
    assert_equal(starts)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_new_rows_of_a_vocabulary_do_not_depend_on_the_device(device: str) -> None:
    grown = []
    for around in ("cpu", device):
        model = tiny.model("llama")
        torch.manual_seed(len(grown))
        with torch.device(around), reproducible_init(7):
            resize_vocabulary(model, tiny.VOCABULARY + 5)
        grown.append(model.get_input_embeddings().weight)
    assert torch.equal(*grown)
    assert bool((grown[0][-5:] != 0).all())
