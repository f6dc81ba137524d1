"""The sharded checkpoints of FSDP2: no code is run, and what cannot be used is told in words."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import Start, status  # type: ignore[import-not-found]
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.api import CheckpointException

from minigpt.errors import ModelError, TrainingError
from minigpt.files import write_manifest
from minigpt.model.parallel import FSDP2
from minigpt.model.restore import SHARDED
from minigpt.model.sharded import load_into
from minigpt.runs.checkpoints import newest_checkpoint

SHARDS = {"trainer__strategy": {"class_path": "minigpt.model.parallel.FSDP2"}}
AGAIN = ("--ckpt_path", "auto")


class Trap:
    """What a malicious checkpoint holds: code that runs when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def last(run: Any) -> str:
    lines = [line for line in run.output.splitlines() if line.startswith("minigpt: ")]
    return str(lines[-1])


@pytest.mark.parametrize("file", [".metadata", SHARDED])
def test_a_sharded_checkpoint_with_code_in_it_is_refused(
    file: str, start: Start, tmp_path: Path
) -> None:
    assert start("pretrain", "run", **SHARDS).wait() == 0
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    trap = Trap(tmp_path / "trapped")
    if file == SHARDED:
        state = torch.load(checkpoint / SHARDED, weights_only=True)
        torch.save({**state, "more": trap}, checkpoint / SHARDED)
    else:
        table = pickle.loads((checkpoint / file).read_bytes())
        table.planner_data = trap
        (checkpoint / file).write_bytes(pickle.dumps(table))
    write_manifest(checkpoint)
    run = start("pretrain", "run", *AGAIN, **SHARDS, trainer__max_steps=9)
    assert run.wait() == 2
    assert f"The checkpoint {checkpoint} is refused: it holds more than" in last(run)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_value_in_a_shard_runs_no_code(tmp_path: Path) -> None:
    path, trapped = tmp_path / "step=1", tmp_path / "trapped"
    save({"lr": Trap(trapped), "plain": 0.1}, checkpoint_id=path)
    state = {"plain": 0.0}
    load_into(state, path)
    assert state == {"plain": 0.1}
    with pytest.raises(ModelError, match="it holds more than numbers"):
        load_into({"lr": 0.0}, path)
    assert not trapped.exists()
    load({"lr": 0.0}, checkpoint_id=path)
    assert trapped.exists()  # the trap itself works


def test_a_change_of_the_kind_of_checkpoint_is_refused_in_words(
    start: Start, tmp_path: Path
) -> None:
    for name, first, then, message in (
        ("one", {}, SHARDS, "is of one file (one process, or DDP), and this strategy reads one in"),
        ("two", SHARDS, {}, "is in shards (FSDP2), and this strategy reads one of one file (one"),
    ):
        assert start("pretrain", name, **first).wait() == 0
        run = start("pretrain", name, *AGAIN, **then, trainer__max_steps=9)
        assert run.wait() == 2
        assert f"The checkpoint {tmp_path / name}/checkpoints/step=8 {message}" in last(run)


def test_weights_of_another_size_are_refused_in_words(start: Start, world: Path) -> None:
    assert start("sft", "run", **SHARDS).wait() == 0
    other = {"model__init_args__init_from": str(world / "gpt2"), **SHARDS, "trainer__max_steps": 9}
    run = start("sft", "run", *AGAIN, **other)
    assert run.wait() == 2
    assert "does not fit this model: the shape of lm.hf." in last(run)


def test_a_full_disk_is_told(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert start("pretrain", "run", **SHARDS, trainer__max_steps=3).wait() == 0
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    limit = {"RLIMIT_FSIZE": max(f.stat().st_size for f in checkpoint.iterdir()) // 2}
    run = start("pretrain", "run", *AGAIN, **SHARDS, limits=limit)
    assert run.wait() == 2, run.output
    assert f"{run_dir}/checkpoints/step=6 could not be written: " in last(run)
    assert status(run_dir)["state"] == "failed"
    assert newest_checkpoint(run_dir) == checkpoint
    assert start("pretrain", "run", *AGAIN, **SHARDS).wait() == 0


def test_what_failed_in_another_process_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise CheckpointException("", {1: (OSError(errno.ENOSPC, "No space left"), StackSummary())})

    monkeypatch.setattr(ModelParallelStrategy, "save_checkpoint", full)
    with pytest.raises(TrainingError, match=f"{tmp_path}/step=3 could not be written: No space"):
        FSDP2().save_checkpoint({}, tmp_path / "step=3")
