"""Checkpoints are whole or absent, and only whole ones are used."""

from __future__ import annotations

import os
import pickle
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import eventually
from runs import Running, Start, after_saving, at, blocked_in, rows, status  # type: ignore[import-not-found]

from minigpt.files import (
    MANIFEST,
    NEW,
    STAGING,
    clear_leftovers,
    damage,
    remove_directory,
    write_manifest,
)
from minigpt.model.pretrained import load_model
from minigpt.runs.checkpoints import STATE, newest_checkpoint, newest_first

# Large enough that a run which saves after each step spends most of its time on saving.
LARGE = {"hidden_size": 256, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 512}
LARGE |= {"max_positions": 128}


def test_damaged_checkpoints_are_passed_over_and_refused_by_name(
    start: Start, tmp_path: Path
) -> None:
    assert start("sft", "run").wait() == 0
    run_dir = tmp_path / "run"
    newest, second, third = newest_first(run_dir)
    weights = (newest / STATE).read_bytes()
    (newest / STATE).write_bytes(weights[:-100] + b"\0" * 100)  # of the right size
    (second / MANIFEST).unlink()
    explicit = start("sft", "run", "--ckpt_path", str(second))
    assert explicit.wait() == 2
    assert re.search(rf"^minigpt: The checkpoint {second} is damaged: its", explicit.output, re.M)
    auto = start("sft", "run", "--ckpt_path", "auto", trainer__max_steps=9)
    assert auto.wait() == 0
    assert f"{newest} is damaged (the content of {STATE} is not what was written)" in auto.output
    assert f"{second} is damaged (its {MANIFEST} is missing)" in auto.output
    assert f"Resuming from {third}" in auto.output
    (third / STATE).write_bytes(weights[:-1])
    cut = start("sft", "run", "--ckpt_path", str(third))
    assert cut.wait() == 2
    assert f"{STATE} has {len(weights) - 1} bytes instead of " in cut.output


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.faults)])
def test_a_kill_while_saving_loses_at_most_the_unfinished_checkpoint(
    kills: int, start: Start, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "model__init_args__architecture": LARGE,
        "trainer__max_steps": 100_000,
        "trainer__val_check_interval": 100_000,
        "checkpoint": {"every": 1, "keep": 3},
    }
    rng, run_dir, before, hits = random.Random(0), tmp_path / "run", -1, 0
    for kill in range(kills):
        saving = kill % 2 == 0
        callbacks = blocked_in("minigpt.runs.checkpoints.write_manifest", 1) if saving else []
        args = ("pretrain", "run", "--ckpt_path", "auto")
        run = start(*args, trainer__callbacks=callbacks, **changes)
        eventually(lambda last=before: number(newest(run_dir)) > last)
        if saving:
            saved = f"{STAGING}*/{NEW}/{STATE}"
            eventually(lambda saved=saved: any((run_dir / "checkpoints").glob(saved)))
        else:  # at any moment
            time.sleep(rng.uniform(0, 0.2))
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        hits += any(
            (run_dir / "checkpoints").glob(f"{STAGING}*")
        )  # the kill in the middle of a save
        assert all(damage(path) is None for path in newest_first(run_dir))
        checkpoint = newest_checkpoint(run_dir)
        assert number(checkpoint) > before
        logged = int(rows(run_dir)[-1]["step"]) + 1  # the last step that was done
        assert logged - number(checkpoint) <= 1
        before = number(checkpoint)
    partial = {path.name for path in (run_dir / "checkpoints").glob(".*")}
    assert len(partial) <= 1  # what a kill leaves is cleared by the next run
    assert hits >= kills / 2
    changes["trainer__max_steps"] = before + 3
    assert start("pretrain", "run", "--ckpt_path", "auto", **changes).wait() == 0
    assert start("pretrain", "whole", **{**changes, "checkpoint": {"every": 100_000}}).wait() == 0
    ends = [(tmp_path / n / "hf" / "model.safetensors").read_bytes() for n in ("run", "whole")]
    assert ends[0] == ends[1]


def test_a_removal_that_is_cut_off_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "step=3"
    path.mkdir(parents=True)
    for name in (STATE, "other"):
        (path / name).touch()
    write_manifest(path)

    def killed(directory: Path, **_: Any) -> None:
        (directory / MANIFEST).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("minigpt.files.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_directory(path)
    assert list(newest_first(tmp_path)) == []
    assert any((tmp_path / "checkpoints").iterdir())
    monkeypatch.undo()
    clear_leftovers(tmp_path / "checkpoints")
    assert not any((tmp_path / "checkpoints").iterdir())


def newest(run_dir: Path) -> Path | None:
    return next(iter(newest_first(run_dir)), None)


def number(path: Path | None) -> int:
    return int(path.name.partition("=")[2]) if path else -1


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_goes_on_from_an_earlier_step_leaves_the_later_ones(
    keep: int, start: Start, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    changes: dict[str, Any] = {"checkpoint": {"every": 2, "keep": 9}}
    assert start("pretrain", "run", trainer__accumulate_grad_batches=1, **changes).wait() == 0
    assert checkpoint_names(run_dir) == ["step=2", "step=4", "step=6", "step=8"]
    changes = {"checkpoint": {"every": 2, "keep": keep}, "trainer__accumulate_grad_batches": 1}
    early, dies = ("--ckpt_path", str(run_dir / "checkpoints" / "step=2")), at("train_batch_start")
    killed = start("pretrain", "run", *early, trainer__callbacks=dies, **changes)
    assert killed.wait() == -signal.SIGKILL
    assert checkpoint_names(run_dir) == ["aside-step=4", "aside-step=6", "aside-step=8", "step=2"]
    assert "after step 2, without step=8, step=6, step=4: kept as " in killed.output
    stop = at("train_batch_start", signal_name="SIGTERM")
    stopped = start("pretrain", "run", "--ckpt_path", "auto", trainer__callbacks=stop, **changes)
    assert stopped.wait() == 75
    assert f"Resuming from {run_dir}/checkpoints/step=2" in stopped.output
    assert checkpoint_names(run_dir) == ["step=2", "step=3"][-keep:]
    last = start("pretrain", "run", "--ckpt_path", "auto", **changes)
    assert last.wait() == 0
    assert f"Resuming from {run_dir}/checkpoints/step=3" in last.output


def test_damaged_small_files_do_not_keep_a_run_from_going_on(start: Start, tmp_path: Path) -> None:
    assert start("sft", "whole").wait() == 0
    run_dir = tmp_path / "run"
    assert start("sft", "run", trainer__max_steps=7).wait() == 0
    manifest = run_dir / "checkpoints" / "step=7" / MANIFEST
    manifest.write_bytes(manifest.read_bytes().replace(b'"files"', b'"fil\xe5s"'))
    odd = run_dir / "checkpoints" / "step=²"
    odd.mkdir()
    (run_dir / "status.json").unlink()
    (run_dir / "status.json").mkdir()
    metrics = run_dir / "metrics.jsonl"
    junk = b'junk\n\0\0\0\n\xff\n{"loss": 1}\n'
    metrics.write_bytes(junk + metrics.read_bytes())
    run = start("sft", "run", "--ckpt_path", "auto")
    assert run.wait() == 0, run.output
    assert f"Resuming from {run_dir}/checkpoints/step=6" in run.output
    for named in (f"{manifest.parent} is damaged", odd, f"{metrics}: 4 damaged lines are left out"):
        assert str(named) in run.output
    assert f"{run_dir}/status.json is no regular file" in run.output
    assert status(run_dir)["state"] == "finished"
    assert rows(run_dir) == rows(tmp_path / "whole")
    assert odd.exists()


def test_the_row_of_a_step_outlives_a_kill_right_after_its_checkpoint(
    start: Start, tmp_path: Path
) -> None:
    assert start("sft", "whole").wait() == 0
    run_dir = tmp_path / "run"
    killed = start("sft", "run", trainer__callbacks=after_saving(1))
    assert killed.wait() == -signal.SIGKILL
    assert checkpoint_names(run_dir) == ["step=3", "step=6"]
    assert rows(run_dir)[-1]["step"] == 4  # the sixth step is saved, but not logged yet
    assert start("sft", "run", "--ckpt_path", "auto").wait() == 0
    assert rows(run_dir) == rows(tmp_path / "whole")


@pytest.mark.faults
def test_machines_that_see_different_checkpoints_stop(start: Start, tmp_path: Path) -> None:
    """Two machines that share no disk: the run directory of the second one is another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = {"trainer__strategy": "ddp", "trainer__devices": 1, "trainer__num_nodes": 2}
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}

    def both(*names: str) -> list[Running]:
        runs = [
            start("sft", name, "--ckpt_path", "auto", env={**env, "NODE_RANK": str(rank)}, **two)
            for rank, name in enumerate(names)
        ]
        for run in runs:
            run.wait()
        return runs

    assert start("sft", "here", trainer__accumulate_grad_batches=4).wait() == 0
    first, second = both("here", "there")
    for run in (first, second):
        assert run.status == 2, run.output
        assert "process 0 from step=8 with manifest " in run.output
        assert "process 1 from no checkpoint. Let all machines see one run directory" in run.output
    shutil.copytree(tmp_path / "here" / "checkpoints", tmp_path / "there" / "checkpoints")
    assert [run.status for run in both("here", "there")] == [0, 0]


def test_damaged_checkpoints_do_not_count_as_kept(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert start("pretrain", "run", checkpoint={"every": 2, "keep": 9}).wait() == 0
    for name in ("step=6", "step=8"):
        (run_dir / "checkpoints" / name / MANIFEST).unlink()
    changes: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 2}, "trainer__max_steps": 5}
    assert start("pretrain", "run", "--ckpt_path", "auto", **changes).wait() == 0
    assert checkpoint_names(run_dir) == ["step=4", "step=5"]


def test_a_full_disk_is_told_and_earlier_checkpoints_stay(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = start("pretrain", "run", trainer__max_steps=3)
    assert first.wait() == 0
    before = (run_dir / "checkpoints" / "step=3" / STATE).read_bytes()
    limit = {"RLIMIT_FSIZE": len(before) // 2}
    more = start("pretrain", "run", "--ckpt_path", "auto", limits=limit, trainer__max_steps=8)
    assert more.wait() == 2
    (last,) = (line for line in more.output.splitlines() if line.startswith("minigpt: "))
    assert f"{run_dir}/checkpoints/step=6 could not be written: " in last
    assert "Trained" not in more.output.partition("Resuming")[2]
    assert status(run_dir)["state"] == "failed"
    assert [p.name for p in newest_first(run_dir)] == ["step=3"]
    assert (run_dir / "checkpoints" / "step=3" / STATE).read_bytes() == before
    assert start("pretrain", "run", "--ckpt_path", "auto").wait() == 0


def test_a_disk_that_is_full_at_the_export_is_told(start: Start, tmp_path: Path) -> None:
    full = [{"class_path": "moments.FullDisk", "init_args": {"size": 20_000}}]
    run = start("pretrain", "run", trainer__callbacks=full)
    assert run.wait() == 2, run.output
    last = run.output.rpartition("minigpt: ")[2]
    assert last.startswith(f"{tmp_path}/run/hf could not be written: File too large. ")
    assert status(tmp_path / "run")["state"] == "failed"
    assert not (tmp_path / "run" / "hf").exists()
    assert start("pretrain", "run", "--ckpt_path", "auto").wait() == 0
    assert load_model(tmp_path / "run")


def test_a_directory_that_cannot_be_written_to_is_told(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    run = start("pretrain", "run", "--overwrite", "false", "--ckpt_path", "auto")
    assert run.wait() == 2
    assert f"{tmp_path}/run/checkpoints/step=3 could not be written: " in run.output


def test_a_directory_that_became_read_only_is_told(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert start("pretrain", "run", trainer__max_steps=3).wait() == 0
    (run_dir / "checkpoints").chmod(0o555)
    more = start("pretrain", "run", "--ckpt_path", "auto", plain_user=True)
    code = more.wait()
    (run_dir / "checkpoints").chmod(0o755)
    assert code == 2, more.output
    last = more.output.rpartition("minigpt: ")[2]
    assert last.startswith(f"{run_dir}/checkpoints/step=6 could not be written: Permission denied")
    assert "Trained" not in more.output.partition("Resuming")[2]
    assert status(run_dir)["state"] == "failed"
    assert checkpoint_names(run_dir) == ["step=3"]
    assert damage(run_dir / "checkpoints" / "step=3") is None
    assert start("pretrain", "run", "--ckpt_path", "auto").wait() == 0


@pytest.mark.parametrize("minigpt_io", [True, False])
def test_nothing_is_written_to_the_directory_for_temporary_files(
    minigpt_io: bool, start: Start, tmp_path: Path
) -> None:
    """Lightning's way, the negative control, goes through it: another, perhaps smaller disk."""
    temp_dir, noted = tmp_path / "tmp", tmp_path / "opened"
    temp_dir.mkdir()
    options = {"under": str(temp_dir), "file": str(noted), "minigpt_io": minigpt_io}
    watch = [{"class_path": "moments.Opened", "init_args": options}]
    run = start("pretrain", "run", env={"TMPDIR": str(temp_dir)}, trainer__callbacks=watch)
    assert run.wait() == 0, run.output
    assert bool(noted.read_text()) != minigpt_io


class Trap:
    """What a malicious checkpoint holds: code that runs when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_with_code_in_it_is_refused(start: Start, tmp_path: Path) -> None:
    assert start("pretrain", "run").wait() == 0
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    state = torch.load(checkpoint / STATE, weights_only=True)
    torch.save({**state, "chance": Trap(tmp_path / "trapped")}, checkpoint / STATE)
    write_manifest(checkpoint)
    for ckpt_path in ("auto", str(checkpoint)):
        run = start("pretrain", "run", "--ckpt_path", ckpt_path, trainer__max_steps=9)
        assert run.wait() == 2
        assert f"The checkpoint {checkpoint} is refused: it holds more than" in run.output
    assert not (tmp_path / "trapped").exists()
    (tmp_path / "trapped").mkdir()
    with pytest.raises(FileExistsError):  # the trap itself works
        torch.load(checkpoint / STATE, weights_only=False)


def test_a_model_that_is_pickled_is_never_loaded(start: Start, world: Path, tmp_path: Path) -> None:
    directory = tmp_path / "pickled"
    directory.mkdir()
    for path in (world / "sft" / "hf").iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    run = start("sft", "run", model__init_args__init_from=str(directory))
    assert run.wait() == 2
    assert not (tmp_path / "trapped").exists()
