"""However the targets of a step are cut into micro-batches, the step is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import Fit

from minigpt.cli.trainer import MiniGPTCLI
from minigpt.data.batch import PackedBatch
from minigpt.data.datamodule import PackedDataset
from minigpt.model.optimizer import learning_rate_factor
from minigpt.model.packed_lm import PackedLM
from minigpt.model.pretrained import load_model

pytestmark = pytest.mark.usefixtures("sgd")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights that a run has saved, those of an adapter merged."""
    file = run_dir / "hf" / "model.safetensors"
    return load_file(file) if file.is_file() else load_model(run_dir).state_dict()


def micro_batches(cli: MiniGPTCLI, epoch: int) -> list[PackedBatch]:
    data: Any = cli.datamodule
    return list(PackedDataset(data.order, data.train_subsets, epoch, 0, 0, 1))


def by_hand(
    cli: MiniGPTCLI, start: Path, epochs: int, accumulate: int, clip: Callable[[PackedLM], Any]
) -> PackedLM:
    """Plain SGD on the mean loss of all targets of each window, written out."""
    lm = PackedLM(load_model(start))
    total = cli.model.total_steps()
    factor = learning_rate_factor(cli.model.schedule_options, total)
    step = 0
    for epoch in range(epochs):
        batches = micro_batches(cli, epoch)
        for first in range(0, len(batches), accumulate):
            window = batches[first : first + accumulate]
            lm.zero_grad()
            targets = sum(len(batch.labels) for batch in window)
            (sum(lm(batch) for batch in window) / targets).backward()
            clip(lm)
            with torch.no_grad():
                for p in lm.parameters():
                    p -= 0.2 * factor(step) * p.grad
            step += 1
    assert step == total
    return lm


@pytest.mark.parametrize(
    ("clip", "algorithm"), [(0.05, "norm"), (1e9, "norm"), (1e-3, "value"), (0.0, "value")]
)
def test_windows_equal_steps_written_out(
    world: Path, tmp_path: Path, fit: Fit, clip: float, algorithm: str
) -> None:
    def clipped(lm: PackedLM) -> None:
        if clip and algorithm == "value":
            torch.nn.utils.clip_grad_value_(lm.parameters(), clip)
        elif clip:
            torch.nn.utils.clip_grad_norm_(lm.parameters(), clip)

    cli = fit(
        "sft",
        data__init_args__tokens_per_batch=64,
        trainer__accumulate_grad_batches=8,
        trainer__gradient_clip_val=clip,
        trainer__gradient_clip_algorithm=algorithm,
        trainer__max_epochs=2,
        trainer__max_steps=-1,
    )
    assert len(micro_batches(cli, 0)) % 8  # so the last window of an epoch is short
    assert len({len(batch.labels) for batch in micro_batches(cli, 0)}) > 3
    expected = by_hand(cli, world / "pretrain", 2, 8, clipped)
    for name, value in weights(tmp_path / "run").items():
        assert torch.allclose(value, expected.hf.state_dict()[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "kto", "lora", "reward"])
def test_one_large_batch_equals_many_small_ones(stage: str, tmp_path: Path, fit: Fit) -> None:
    """The whole file in a step: as one batch, and as a short window of small ones."""
    extra: dict[str, Any] = {"trainer__max_epochs": 2, "trainer__max_steps": -1}
    extra["model__init_args__schedule"] = {"warmup": 0, "decay": 0}
    if stage == "lora":
        extra["model__init_args__lora"] = {"dropout": 0.0}
    fit(stage, "large", data__init_args__tokens_per_batch=8192, **extra)
    small = fit(
        stage,
        "small",
        data__init_args__tokens_per_batch=128,
        trainer__accumulate_grad_batches=64,
        **extra,
    )
    assert 8 <= len(micro_batches(small, 0)) < 64
    large = weights(tmp_path / "large")
    for name, value in weights(tmp_path / "small").items():
        assert torch.allclose(value, large[name], rtol=1e-4, atol=2e-6), name


def test_the_logged_loss_is_the_mean_over_targets(world: Path, fit: Fit, tmp_path: Path) -> None:
    cli = fit("sft", data__init_args__tokens_per_batch=64)
    lm = PackedLM(load_model(world / "pretrain"))
    data: Any = cli.datamodule
    held_out = list(PackedDataset(data.val_order, data.val_subsets, 0, 0, 0, 1))
    with torch.no_grad():
        total = sum(lm(batch).item() for batch in held_out)
    mean = total / sum(len(batch.labels) for batch in held_out)
    recorder = next(c for c in cli.trainer.callbacks if type(c).__name__ == "RunRecorder")
    assert len(held_out) > 2
    assert recorder.before["val/loss"] == pytest.approx(mean, rel=1e-5)
