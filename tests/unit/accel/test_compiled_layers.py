"""Compiled layers: the same numbers, no compiling after the first batches, never a crash."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from minigpt.accel import compile_model, compiling_pays, cpu_attention
from minigpt.accel.compiled_layers import _first_batches
from minigpt.data.batch import PackedBatch, collate
from minigpt.model.packed_lm import PackedLM, use_attention

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns about itself


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def results(lm: PackedLM, batch: Any, per_answer: bool, half: bool) -> list[torch.Tensor]:
    with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=half):
        value = lm(batch, per_answer)
    weights = [p for p in lm.parameters() if p.requires_grad]
    return [value.detach(), *torch.autograd.grad(value.sum(), weights)]


def assert_compiled_once(
    lm: PackedLM, batches: list[PackedBatch], half: bool, pairs: bool = False
) -> None:
    device = batches[0].input_ids.device.type
    kinds = (True,) if pairs else (False, True)
    plain = [results(lm, b, p, half) for b in batches for p in kinds]
    compile_model(
        lm, 256, 256, partial(torch.autocast, device, torch.bfloat16, enabled=half), pairs
    )
    got = [results(lm, b, p, half) for b in batches[:2] for p in kinds]
    warm = compiled_graphs()
    assert warm > 0
    got += [results(lm, b, p, half) for b in batches[2:] for p in kinds]
    assert compiled_graphs() == warm
    # bf16 keeps 8 bits, and is rounded in other places; on a GPU also between layers
    bound = (0.06 if device == "cpu" else 0.1) if half else 1e-5
    for ours, truth in zip(got, plain, strict=True):
        for a, b in zip(ours, truth, strict=True):
            assert float((a - b).norm()) <= bound * float(b.norm()) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "half", [pytest.param(False, marks=pytest.mark.large), True], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_equals_plain_and_is_compiled_once(half: bool, device: str) -> None:
    lm = PackedLM(tiny.model("qwen3")).to(device)
    layouts = [
        [100, 60, 90],
        [20, 120, 100, 7],
        [125, 125],
        [100, 100, 9],
        [250],
        [30, 30, 30, 30, 30, 30, 30, 40],
        [6, 244],
    ]
    batches = [tiny.batch(lengths, seed).to(device) for seed, lengths in enumerate(layouts)]
    chats = [replace(text, targets=text.ids % 3 > 0) for text in tiny.texts([90, 40, 120])]
    others = [collate(chats).to(device), batches[0].without_targets()]
    assert_compiled_once(lm, [*batches, *others], half)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_so_is_a_model_that_sees_preferences(device: str) -> None:
    lm = PackedLM(tiny.model("qwen3")).to(device)
    layouts = [[(40, 30, 77)], [(9, 3, 1), (20, 50, 60)], [(1, 1, 1), (30, 3, 9)], [(100, 20, 9)]]
    batches = [collate(tiny.preferences(shapes)).to(device) for shapes in layouts]
    assert_compiled_once(lm, batches, half=True, pairs=True)
    if device == "cuda":
        assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(not cpu_attention.available(), reason="this CPU has no kernel for attention")
@pytest.mark.parametrize("pairs", [False, True], ids=["texts", "pairs"])
def test_a_layer_is_compiled_as_a_whole_around_the_kernel(pairs: bool) -> None:
    lm = PackedLM(tiny.model("qwen3", head_dim=16))
    shapes = [[(40, 30, 77), (9, 3, 1)], [(20, 50, 60)], [(100, 20, 9)], [(1, 2, 2), (3, 1, 9)]]
    layouts = [[100, 60, 90], [20, 120, 7], [250], [3, 244]]
    all_samples = map(tiny.preferences, shapes) if pairs else map(tiny.texts, layouts)
    assert_compiled_once(lm, [collate(samples) for samples in all_samples], half=True, pairs=pairs)
    assert not counters["graph_break"]


def test_short_batches_go_through_the_layers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def spy(plain: Any, **_: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            lengths.extend([len(args[0][0])] if "plan" in kwargs else [])
            return plain(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", spy)
    lm = PackedLM(tiny.model("llama"))  # of two layers
    compile_model(lm, 256, 256, nullcontext)
    assert not torch._dynamo.config.optimize_ddp  # which would cut layers apart
    lengths.clear()
    full = tiny.batch([128])
    for batch in (full, tiny.batch([127]), full.without_targets(), tiny.batch([2] + [1] * 199)):
        lm(batch)
    assert lengths == [128, 128]


@pytest.mark.parametrize("tokens", [256, 1000, 4096, 98304])
def test_the_warm_up_meets_all_kinds_of_rows(tokens: int) -> None:
    plans = [batch.plan for batch in _first_batches(tokens, False, 4096)]
    rows = [len(plan.cu_queries) - 1 for plan in plans]
    full = [plan.full for plan in plans]
    assert full[0] == 0
    assert 1 < full[1] == rows[1] - 1
    assert 1 < full[2] == rows[2]
    for batch in _first_batches(tokens, False, 100):
        assert int(batch.position_ids.max()) < 100


@pytest.mark.slow
def test_generation_goes_through_the_layers_as_they_are() -> None:
    model = tiny.model("qwen3").eval()
    ids = torch.arange(5)[None]
    with use_attention(model, "sdpa"):
        before = model.generate(ids, max_new_tokens=5, do_sample=False)
    lm = PackedLM(model)
    compile_model(lm, 256, 256, nullcontext)
    warm = compiled_graphs()
    with use_attention(model, "sdpa"):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)
    assert compiled_graphs() == warm > 0


def test_a_model_that_cannot_be_compiled_trains_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TorchDynamoException("\nno C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    lm, batch = PackedLM(tiny.model("llama")), tiny.batch([20, 7])
    expected = lm(batch)
    compile_model(lm, 256, 256, nullcontext)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(lm(batch), expected)
        assert torch.equal(lm(batch), expected)
    assert caplog.messages == ["Not compiled, which only costs speed: no C++ compiler"]


LONG = {"batches": 10**6, "precision": "bf16-mixed", "strategy": SingleDeviceStrategy("cpu")}


@pytest.mark.parametrize(
    ("changes", "pays"),
    [
        ({}, True),
        ({"batches": 10}, False),
        ({"precision": "32-true"}, False),
        ({"strategy": ModelParallelStrategy()}, False),
    ],
)
def test_compiling_pays_in_long_runs_in_half_precision(changes: dict[str, Any], pays: bool) -> None:
    options = {**LONG, **changes}
    if isinstance(options["strategy"], ModelParallelStrategy):
        options["strategy"].parallel_devices = [torch.device("cpu")]
    trainer: Any = SimpleNamespace(
        strategy=options["strategy"],
        precision=options["precision"],
        datamodule=SimpleNamespace(tokens_per_batch=4096),
    )
    assert compiling_pays(trainer, tiny.model("qwen3"), options["batches"]) is pays
