"""A step reads its numbers at one place; nothing else makes the host wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_runs import Fit
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.data.datamodule import JSONLDataModule
from minigpt.stages.base import BaseModule


class Reads(TorchDispatchMode):
    """Counts the scalars that are read from a tensor one by one, each of which is a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_steps_read_no_scalar(stage: str, fit: Fit) -> None:
    counts = []
    changes: dict[str, Any] = {
        "data__init_args__tokens_per_batch": 128,
        "trainer__log_every_n_steps": 100,
        "trainer__limit_val_batches": 0,
    }
    for steps in (2, 7):
        with Reads() as reads:
            cli = fit(stage, f"{steps}", trainer__max_steps=steps, **changes)
        assert cli.datamodule.optimizer_steps(1, 1) >= steps  # a new epoch reads some
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_micro_batches_read_no_scalar(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the progress bar either, which is as on a terminal here."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    counts = []
    for accumulate in (1, 4):
        with Reads() as reads:
            cli = fit(
                "sft",
                f"{accumulate}",
                data__init_args__tokens_per_batch=64,
                trainer__accumulate_grad_batches=accumulate,
                trainer__enable_progress_bar=True,
                trainer__val_check_interval=accumulate,
                trainer__max_steps=3,
            )
        assert cli.datamodule.optimizer_steps(1, 4) >= 3
        counts.append(reads.count)
    assert counts[0] == counts[1]


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Refuse to wait for a GPU from the third step's batch on to its gradients; gives how strict
    each step was.
    """
    step, finish, move = (
        BaseModule.training_step,
        BaseModule.on_before_optimizer_step,
        JSONLDataModule.transfer_batch_to_device,
    )
    modes: list[int] = []

    def strictly(module: Any, *args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if module.trainer.global_step > 1 else "default")
        return step(module, *args)

    def loosely(module: Any, *args: Any, **kwargs: Any) -> None:
        modes.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("default")
        finish(module, *args, **kwargs)

    def moved(data: Any, *args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        batch = move(data, *args)
        torch.cuda.set_sync_debug_mode("default")
        return batch

    monkeypatch.setattr(BaseModule, "training_step", strictly)
    monkeypatch.setattr(BaseModule, "on_before_optimizer_step", loosely)
    monkeypatch.setattr(JSONLDataModule, "transfer_batch_to_device", moved)
    yield modes
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_a_gpu_is_waited_for_only_before_an_update(stage: str, fit: Fit, strict: list[int]) -> None:
    fit(stage, trainer__accelerator="gpu", trainer__precision="bf16-mixed", trainer__max_steps=5)
    assert strict == [0, 0, 2, 2, 2]
