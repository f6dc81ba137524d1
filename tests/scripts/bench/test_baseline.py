"""The baseline does the same work as our own arm, and counts it in the same way."""

from __future__ import annotations

import json
import math
from itertools import count, islice
from pathlib import Path
from typing import Any

import baseline
import pytest
import tiny_runs
import torch
from baseline import LoopConfig
from safetensors.torch import load_file
from torch import nn
from train import moments, run_baseline
from transformers import AutoModelForCausalLM

from minigpt.data import tokenizer as tokenizers
from minigpt.data.batch import PackedBatch, collate
from minigpt.data.datamodule import PackedDataset, StoreSubset
from minigpt.data.order import FileShare, PackedOrder
from minigpt.data.store import Limits, TokenStore, open_store
from minigpt.infer.engine import Engine
from minigpt.model.losses import dpo
from minigpt.model.packed_lm import PackedLM
from minigpt.model.pretrained import load_model

KINDS: dict[str, Any] = {"pretrain": "text", "sft": "chat", "dpo": "preference", "lora": "chat"}


def store_of(trained: Path, stage: str) -> TokenStore:
    name = "sft" if stage == "lora" else stage
    tokenizer = tokenizers.load(trained / "tokenizer")
    return open_store(trained / f"{name}.jsonl", KINDS[stage], tokenizer, Limits(64))


def loop(trained: Path, stage: str, **changes: Any) -> LoopConfig:
    defaults: dict[str, Any] = {
        "model": str(trained / "pretrain" / "hf"),
        "stores": (str(store_of(trained, stage).path), None),
        "batch_size": 4,
        "max_length": 16,
        "tokens_per_batch": 128,
        "precision": "32-true",
        "device": "cpu",
        "steps": 2,
        "seconds": 60,
    }
    return LoopConfig(stage=stage, **{**defaults, **changes})


def packed(store: TokenStore, count: int) -> PackedBatch:
    selection = StoreSubset(store)
    return collate([selection.sample(number) for number in range(count)])


def padded(store: TokenStore, count: int) -> dict[str, torch.Tensor]:
    samples = baseline.samples(store, range(count))
    return baseline.collate([row for rows in zip(*samples, strict=True) for row in rows], "cpu")


def plain(trained: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(trained / "pretrain" / "hf")


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_losses_are_those_of_our_own(stage: str, trained: Path) -> None:
    store = store_of(trained, stage)
    batch = packed(store, 6)
    ours = PackedLM(load_model(trained / "pretrain"))(batch) / len(batch.labels)
    theirs = baseline.loss_of(plain(trained), None, padded(store, 6))
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


def test_preference_losses_are_those_of_our_own(trained: Path) -> None:
    store = store_of(trained, "dpo")
    reference = PackedLM(load_model(trained / "pretrain"))
    policy = PackedLM(load_model(trained / "sft"))
    batch = packed(store, 5)
    lengths = torch.bincount(batch.answers)
    expected = dpo(policy(batch, True), reference(batch, True), lengths, beta=0.1).losses.mean()
    model = AutoModelForCausalLM.from_pretrained(trained / "sft" / "hf")
    theirs = baseline.loss_of(model, plain(trained), padded(store, 5))
    assert theirs.item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(theirs.item() - math.log(2)) > 1e-5


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_useful_tokens_are_the_datas_own(stage: str, trained: Path) -> None:
    store = store_of(trained, stage)
    epoch = list(islice(baseline.batches(loop(trained, stage), store), len(store) // 4))
    assert sum(useful for _, useful, _ in epoch) == store.meta["tokens"]
    assert sum(count for _, _, count in epoch) == len(store)
    shapes = {tuple(batch["input_ids"].shape) for batch, _, _ in epoch}
    assert {rows for rows, _ in shapes} == {8 if stage == "dpo" else 4}
    assert len(shapes) > 1  # padded to the batch's own longest
    assert store.meta["tokens"] == pytest.approx(moments(store)[0] * len(store))


def test_pretraining_is_not_padded(trained: Path) -> None:
    store = store_of(trained, "pretrain")
    for batch, useful, _ in islice(baseline.batches(loop(trained, "pretrain"), store), 9):
        assert batch.keys() == {"input_ids", "labels"}
        assert batch["input_ids"].shape == (4, 16)
        assert useful == 64


def texts(batch: PackedBatch) -> torch.Tensor:
    """All tokens of a batch of texts: each one's first, and what is learnt after it."""
    firsts = batch.input_ids[batch.cu_seqlens[:-1].long()]
    return torch.cat(
        [torch.cat([ids[None], batch.labels[batch.answers == n]]) for n, ids in enumerate(firsts)]
    )


@pytest.mark.parametrize("seed", [0, 3])
def test_pretraining_reads_texts_in_our_order(seed: int, trained: Path) -> None:
    store = store_of(trained, "pretrain")
    mixture, selection = [FileShare(len(store), len(store))], StoreSubset(store)
    order = PackedOrder([store.lengths], mixture, 128, seed)
    ours = torch.cat([texts(batch) for batch in PackedDataset(order, [selection], 0, 0, 0, 1)])
    blocks = list(baseline.blocks(loop(trained, "pretrain", seed=seed), store, 0))
    theirs = torch.tensor([ids for ((ids, _),) in blocks]).flatten()
    assert len(theirs) == len(ours) // 16 * 16
    assert torch.equal(theirs, ours[: len(theirs)])
    read = torch.cat(
        [
            batch["input_ids"].flatten()
            for batch, _, _ in islice(
                baseline.batches(loop(trained, "pretrain", seed=seed), store), 5
            )
        ]
    )
    assert torch.equal(read, theirs[: len(read)])


def test_slow_steps_are_measured_more_than_once(trained: Path) -> None:
    done = baseline.train(loop(trained, "sft", seconds=0, steps=100))
    assert done["steps"] == baseline.MIN_STEPS
    assert done["samples"] == baseline.MIN_STEPS * 4


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_it_trains(stage: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[nn.Module] = []
    load = baseline.load

    def recording(config: LoopConfig) -> Any:
        models.append(load(config))
        return models[0]

    monkeypatch.setattr(baseline, "load", recording)
    done = baseline.train(loop(trained, stage, lr=0.01))
    assert done["seconds"] > 0
    assert done["samples"] == 8  # the first of three steps is not counted
    assert 8 < done["tokens"] < 8 * 3 * 64
    assert math.isfinite(done["loss"])
    assert done["peak_rss_mb"] > 100
    start = load_file(trained / "pretrain" / "hf" / "model.safetensors")
    parameters = dict(models[0].named_parameters())
    name = "model.layers.0.mlp.up_proj"
    if stage == "lora":
        assert torch.equal(
            parameters[f"base_model.model.{name}.base_layer.weight"], start[f"{name}.weight"]
        )
        assert parameters[f"base_model.model.{name}.lora_B.default.weight"].abs().max() > 0
        trained_ones = [name for name, p in parameters.items() if p.requires_grad]
        assert all("lora_" in name for name in trained_ones)
        assert len(trained_ones) == 2 * 7 * 2  # all linear layers of two decoder layers
    else:
        assert not torch.equal(parameters[f"{name}.weight"], start[f"{name}.weight"])


def test_fp16_takes_the_steps_of_fp32(trained: Path) -> None:
    wide = baseline.train(loop(trained, "sft", lr=0.01))
    half = baseline.train(loop(trained, "sft", lr=0.01, precision="16-mixed"))
    assert half["loss"] != wide["loss"]
    assert half["loss"] == pytest.approx(wide["loss"], rel=0.01)


def test_rates_fall_over_the_time_and_the_held_out_loss_is_reported(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = count()
    monkeypatch.setattr(baseline.time, "perf_counter", lambda: next(clock) / 32)  # a step's length
    tokenizer = tokenizers.load(trained / "tokenizer")
    val = open_store(trained / "pretrain_val.jsonl", "text", tokenizer, Limits(64))
    stores = (str(store_of(trained, "pretrain").path), str(val.path))
    still = loop(trained, "pretrain", stores=stores, decay=True, seconds=1, steps=99, lr=1e-12)
    batch = packed(val, len(val))
    expected = PackedLM(load_model(trained / "pretrain"))(batch) / len(batch.labels)
    done = baseline.train(still)
    assert done["held_out"] == pytest.approx(expected.item(), rel=1e-4)
    assert done["samples"] == 4 * 32  # with a time to keep, the first step counts as well
    assert baseline.train(LoopConfig(**{**vars(still), "steps": 30}))["samples"] == 4 * 31
    learnt = baseline.train(LoopConfig(**{**vars(still), "lr": 0.01}))
    assert learnt["held_out"] < done["held_out"] - 0.01
    curved = baseline.train(LoopConfig(**{**vars(still), "lr": 0.01, "curve": 3}))
    assert [at for at, _ in curved["curve"]] == pytest.approx([0.25, 0.5, 0.75], abs=0.1)
    assert curved["held_out"] == pytest.approx(learnt["held_out"], abs=1e-3)
    assert curved["samples"] == pytest.approx(learnt["samples"], abs=4 * 4)


@pytest.mark.parametrize("stage", ["sft", "lora"])
def test_the_model_is_saved(stage: str, trained: Path, tmp_path: Path) -> None:
    stores = (str(store_of(trained, stage).path), str(store_of(trained, stage).path))
    options = loop(trained, stage, stores=stores, lr=0.01, save=str(tmp_path / "out"))
    done = baseline.train(options)
    engine = Engine.load(tmp_path / "out")
    assert engine.codec is not None
    held_out = baseline.held_out(engine.model, stores[1], options.batch_size)
    assert held_out == pytest.approx(done["held_out"], rel=1e-4)


def test_it_is_a_program_of_its_own(trained: Path, tmp_path: Path) -> None:
    done = run_baseline(loop(trained, "sft"), tmp_path)
    assert done["useful_tokens_per_s"] == pytest.approx(done["tokens"] / done["seconds"])
    assert json.loads((tmp_path / "work.json").read_text())["stage"] == "sft"
