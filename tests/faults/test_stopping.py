"""A run that is asked to stop finishes its step, saves, and says how it ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from patience import eventually, limit
from runs import (  # type: ignore[import-not-found]
    Start,
    Starter,
    at,
    blocked_in,
    rows,
    slow,
    status,
    until,
)
from safetensors.torch import load_file

from minigpt.runs.checkpoints import STATE, newest_checkpoint

DDP = {"trainer__strategy": "ddp", "trainer__devices": 2, "trainer__accumulate_grad_batches": 1}
FSDP2 = {"class_path": "minigpt.model.parallel.FSDP2"}


@pytest.mark.parametrize(
    ("name", "code", "state"),
    [
        ("SIGTERM", 75, "preempted"),
        ("SIGHUP", 75, "preempted"),
        ("SIGINT", 130, "interrupted"),
    ],
)
def test_a_signal_ends_a_run_in_good_order(
    name: str, code: int, state: str, start: Start, tmp_path: Path
) -> None:
    changes = {"data__init_args__num_workers": 2}
    assert start("sft", "whole", **changes).wait() == 0
    callbacks = at("train_batch_start", 6, signal_name=name, group=True)  # to its workers, too
    run = start("sft", "run", trainer__callbacks=callbacks, **changes)
    assert run.wait() == code, run.output
    assert run.since_the_signal() < limit(20)
    run_status = status(tmp_path / "run")
    assert (run_status["state"], run_status["exit_code"]) == (state, code)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.name == f"step={run_status['step']}"
    assert (
        f"minigpt: stopped by {name}: step {run_status['step']} is saved. Go on with" in run.output
    )
    assert not (tmp_path / "run" / "hf").exists()
    assert start("sft", "run", "--ckpt_path", "auto", **changes).wait() == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert status(tmp_path / "run")["state"] == "finished"


def test_a_run_that_ignores_sighup_goes_on(start: Start, tmp_path: Path) -> None:
    """As `nohup` has it."""
    callbacks = at("train_batch_start", 6, signal_name="SIGHUP", group=True)
    workers = {"data__init_args__num_workers": 2}
    run = start("sft", "run", nohup=True, trainer__callbacks=callbacks, **workers)
    assert run.wait() == 0, run.output
    assert run.since_the_signal() > 0
    assert status(tmp_path / "run")["state"] == "finished"


def test_a_run_whose_terminal_goes_saves(world: Path, tmp_path: Path) -> None:
    config = tiny_runs.config(
        world,
        "pretrain",
        tmp_path / "run",
        trainer__max_steps=100_000,
        trainer__enable_progress_bar=True,  # draws on what is no longer there
    )
    terminal, its_end = os.openpty()
    os.set_blocking(terminal, False)
    run = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, *tiny_runs.arguments("fit", config)],
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
    )
    os.close(its_end)
    metrics = tmp_path / "run" / "metrics.jsonl"
    shown: list[bytes] = []
    eventually(
        lambda: (
            read_what_is_there(terminal, shown)
            and metrics.exists()
            and "train/loss" in metrics.read_text()
        )
    )
    os.close(terminal)
    try:
        assert run.wait(limit(120)) == 75, b"".join(shown).decode()
    finally:
        run.kill()
    run_status = status(tmp_path / "run")
    assert (run_status["state"], run_status["exit_code"]) == ("preempted", 75)
    assert "SIGHUP" in run_status["reason"]
    assert (
        newest_checkpoint(tmp_path / "run")
        == tmp_path / f"run/checkpoints/step={run_status['step']}"
    )


def test_a_long_validation_is_not_waited_for(start: Start, tmp_path: Path) -> None:
    assert start("sft", "whole").wait() == 0
    callbacks = at("validation_batch_start", signal_name="SIGTERM", after=1)
    run = start("sft", "run", trainer__callbacks=callbacks)
    assert run.wait() == 75
    assert start("sft", "run", "--ckpt_path", "auto").wait() == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")  # the validation is made up for


def test_a_signal_before_training_ends_the_run_at_once(start: Start, tmp_path: Path) -> None:
    callbacks = at("fit_start", signal_name="SIGTERM")
    run = start("sft", "run", trainer__callbacks=callbacks)
    assert run.wait() == 75
    assert "before training began" in run.output
    assert status(tmp_path / "run")["exit_code"] == 75


def test_a_signal_while_data_is_prepared_ends_the_run_at_once(
    start: Start, world: Path, tmp_path: Path
) -> None:
    long, cache = tmp_path / "long.jsonl", tmp_path / "cache"
    long.write_text((world / "sft.jsonl").read_text() * 5000)
    data = {"data__init_args__train": str(long), "data__init_args__cache_dir": str(cache)}
    # Or all might be ready before the signal comes.
    never = blocked_in("minigpt.data.store._publish")
    run = start("sft", "run", trainer__callbacks=never, **data)
    eventually(lambda: list(cache.rglob("tokens.bin")))
    run.send(signal.SIGTERM)
    assert run.wait() == 75, run.output
    assert "minigpt: stopped by SIGTERM: before training began." in run.output
    run_status = status(tmp_path / "run")
    assert (run_status["state"], run_status["exit_code"]) == ("preempted", 75)
    assert not list(cache.rglob("tokens.bin"))  # nor is half a store left


def test_an_early_error_after_a_preemption_is_noted(start: Start, tmp_path: Path) -> None:
    callbacks = at("train_batch_start", 6, signal_name="SIGTERM")
    assert start("sft", "run", trainer__callbacks=callbacks).wait() == 75
    refused = start("sft", "run")  # what is there stays as it is
    assert refused.wait() == 2
    assert status(tmp_path / "run")["exit_code"] == 75
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert start("sft", "run", "--ckpt_path", "auto", trainer__max_steps=0).wait() == 2
    assert "trainer.max_steps" in status(tmp_path / "run")["reason"]
    (checkpoint / STATE).write_bytes(b"")
    assert start("sft", "run", "--ckpt_path", str(checkpoint)).wait() == 2
    run_status = status(tmp_path / "run")
    assert (run_status["state"], run_status["exit_code"]) == ("failed", 2)
    assert "is damaged" in run_status["reason"]


def test_the_status_of_a_run_is_its_own(start: Start, tmp_path: Path) -> None:
    first = start("sft", "run", trainer__callbacks=until(tmp_path / "never"))
    eventually(lambda: (tmp_path / "run" / "status.json").exists())
    assert start("sft", "run", "--ckpt_path", str(tmp_path / "none")).wait() == 2
    assert status(tmp_path / "run")["state"] == "running"
    first.send(signal.SIGKILL)
    first.wait()


def test_a_second_ctrl_c_does_not_wait(start: Start, tmp_path: Path) -> None:
    run = start("sft", "run", trainer__callbacks=slow(600))
    eventually(lambda: "taking its time" in run.output)
    run.send(signal.SIGINT)
    eventually(lambda: "SIGINT: stopping after this step" in run.output)
    run.send(signal.SIGINT)
    assert run.wait() == 130


def test_errors_end_with_2_and_say_so(start: Start, tmp_path: Path) -> None:
    run = start("sft", "run", data__init_args__train="none.jsonl")
    assert run.wait() == 2
    run_status = status(tmp_path / "run")
    assert (run_status["state"], run_status["exit_code"]) == ("failed", 2)
    assert "none.jsonl" in run_status["reason"]


ARRAY = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("more", "job", "changes", "who"),
    [
        ({}, "7", {}, {"group": True}),
        (ARRAY, "5_3", {}, {"group": True}),
        pytest.param({}, "7", DDP, {"group": True}, marks=pytest.mark.large),
        pytest.param({}, "7", DDP, {"rank": 1}, marks=pytest.mark.faults),
    ],
    ids=["job", "array", "two processes", "the second of two processes"],
)
def test_slurm_requeues_once_after_the_save_and_the_status(
    more: dict[str, str],
    job: str,
    changes: dict[str, Any],
    who: dict[str, Any],
    start: Start,
    tmp_path: Path,
) -> None:
    tools, asked, run_dir = tmp_path / "bin", tmp_path / "asked", tmp_path / "run"
    tools.mkdir()
    snapshot = f"$(ls {run_dir}/checkpoints) $(grep -c preempted {run_dir}/status.json)"
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@ {snapshot}" >> {asked}\n')
    (tools / "scontrol").chmod(0o755 | stat.S_IXUSR)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **more}
    callbacks = at("train_batch_start", 2, signal_name="SIGUSR1", **who)
    run = start("sft", "run", env=env, trainer__callbacks=callbacks, **changes)
    assert run.wait() == 75, run.output
    assert asked.read_text() == f"requeue {job} step={status(run_dir)['step']} 1\n"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("strategy", "rank"),
    [
        ("ddp", 1),
        (FSDP2, 0),
        pytest.param("ddp", 0, marks=pytest.mark.large),
        pytest.param(FSDP2, 1, marks=pytest.mark.large),
    ],
)
def test_two_processes_stop_together_whichever_was_asked(
    strategy: Any, rank: int, start: Start, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {**DDP, "trainer__strategy": strategy}
    assert start("pretrain", "whole", **changes).wait() == 0
    callbacks = at("train_batch_start", 4, signal_name="SIGTERM", rank=rank)
    run = start("pretrain", "run", trainer__callbacks=callbacks, **changes)
    assert run.wait() == 75, run.output
    assert run.since_the_signal() < limit(30)
    assert status(tmp_path / "run")["state"] == "preempted"
    resumed = start("pretrain", "run", "--ckpt_path", "auto", **changes)
    assert resumed.wait() == 0, resumed.output
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "asked", "code"),
    [
        ("SIGINT", {"rank": 1}, 130),
        pytest.param("SIGINT", {"rank": 0}, 130, marks=pytest.mark.large),
        pytest.param("SIGINT", {"group": True}, 130, marks=pytest.mark.large),
        ("SIGTERM", {"group": True}, 75),
    ],
)
def test_two_processes_leave_together(
    name: str, asked: dict[str, Any], code: int, start: Start, tmp_path: Path
) -> None:
    callbacks = at("train_batch_start", 4, signal_name=name, **asked)
    workers = {"data__init_args__num_workers": 1}
    run = start("pretrain", "run", trainer__callbacks=callbacks, **DDP, **workers)
    assert run.wait() == code, run.output
    assert run.since_the_signal() < limit(30)
    run_status = status(tmp_path / "run")
    assert run_status["exit_code"] == code
    assert (
        newest_checkpoint(tmp_path / "run")
        == tmp_path / f"run/checkpoints/step={run_status['step']}"
    )
    eventually(lambda: not run.group())


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_hangs_when_another_dies(rank: int, start: Start, tmp_path: Path) -> None:
    callbacks = at("train_batch_start", 4, rank=rank)
    run = start("pretrain", "run", trainer__callbacks=callbacks, **DDP)
    ended = run.wait()
    assert run.since_the_signal() < limit(30)
    if rank == 0:
        assert ended == -signal.SIGKILL
        eventually(lambda: "Another process of this run has died" in run.output)
        eventually(lambda: not run.group())
    else:
        assert ended == 1
        assert "minigpt: Another process of this run has died" in run.output
        assert status(tmp_path / "run")["state"] == "failed"
    resumed = start("pretrain", "run", "--ckpt_path", "auto", **DDP)
    assert resumed.wait() == 0, resumed.output


@pytest.mark.faults
def test_the_first_process_leaves_in_its_own_time(start: Start, tmp_path: Path) -> None:
    """Lightning's launcher kills it within 5 s after another one has left."""
    callbacks = at("train_batch_start", 4, signal_name="SIGTERM", rank=1)
    callbacks += slow(7, moment="exception", rank=0)
    run = start("pretrain", "run", trainer__callbacks=callbacks, **DDP)
    assert run.wait() == 75, run.output
    assert status(tmp_path / "run")["exit_code"] == 75


@pytest.mark.faults
def test_a_first_process_that_does_not_notice_says_that_another_died(
    start: Start, tmp_path: Path
) -> None:
    """So it is while it computes, or in NCCL, which waits."""
    callbacks = at("train_batch_start", 0, rank=1) + slow(
        limit(60), moment="train_batch_start", rank=0
    )
    run = start("pretrain", "run", trainer__callbacks=callbacks, **DDP)
    assert run.wait() == 1, run.output
    assert run.since_the_signal() < limit(30)
    assert "minigpt: Another process of this run has died" in run.output
    run_status = status(tmp_path / "run")
    assert (run_status["state"], run_status["exit_code"]) == ("failed", 1)
    eventually(lambda: not run.group())


@pytest.mark.faults
def test_the_status_tells_what_torchrun_hides(world: Path, tmp_path: Path) -> None:
    config = tiny_runs.config(
        world,
        "pretrain",
        tmp_path / "run",
        trainer__max_steps=1000,
        trainer__callbacks=slow(0.1),
        trainer__strategy="ddp",
        trainer__devices="auto",
    )
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "minigpt"]
    launched = subprocess.Popen(
        [sys.executable, "-m", *command, *tiny_runs.arguments("fit", config)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    eventually(lambda: metrics.exists() and "train/loss" in metrics.read_text())
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(limit(60)) not in (0, 75)
    run_status = status(tmp_path / "run")
    assert (run_status["state"], run_status["exit_code"]) == ("preempted", 75)
    assert (
        newest_checkpoint(tmp_path / "run")
        == tmp_path / f"run/checkpoints/step={run_status['step']}"
    )


@pytest.mark.faults
def test_shards_are_gone_on_with_and_end_as_one_model(start: Start, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"trainer__val_check_interval": 100}
    one = start("pretrain", "one", trainer__accumulate_grad_batches=2, **changes)
    assert one.wait() == 0
    changes |= {**DDP, "trainer__strategy": FSDP2}
    killed = start("pretrain", "run", trainer__callbacks=at("train_batch_start", 4), **changes)
    assert killed.wait() == -signal.SIGKILL
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert len(list(checkpoint.glob("*.distcp"))) == 2  # a shard of each process
    assert start("pretrain", "run", "--ckpt_path", "auto", **changes).wait() == 0
    sharded, other = tmp_path / "run" / "hf", tmp_path / "one" / "hf"
    assert {p.name for p in sharded.iterdir()} == {p.name for p in other.iterdir()}
    for file in sharded.iterdir():
        if file.suffix != ".safetensors":
            assert file.read_bytes() == (other / file.name).read_bytes(), file.name
    weights, expected = (
        load_file(directory / "model.safetensors") for directory in (sharded, other)
    )
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


IN_A_TERMINAL = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from minigpt.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def read_what_is_there(terminal: int, shown: list[bytes]) -> bool:
    """Read what a terminal shows, so that writing to it never waits."""
    with suppress(BlockingIOError):
        while data := os.read(terminal, 1 << 16):
            shown.append(data)
    return True


BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
SPAWNING = """
import sys
from measure import run, spawn
sys.exit(run(lambda arguments: spawn(["-m", "sleeper"], "it"), []))
"""


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("data check {file}", "SIGTERM"),
        ("data check {file}", "SIGHUP"),
        ("generate --model {world}/sft --file {file}", "SIGTERM"),
    ],
)
def test_every_verb_says_that_it_was_stopped(
    verb: str, name: str, starter: Starter, world: Path, tmp_path: Path
) -> None:
    file = tmp_path / "endless.jsonl"
    os.mkfifo(file)
    args = verb.format(file=file, world=world).split()
    run = starter.start(args, tmp_path / "log")
    writer = eventually(lambda: opened(file))  # the verb waits for rows
    run.send(signal.Signals[name])
    assert run.wait() == 75, run.output
    os.close(writer)
    assert run.output == f"minigpt: stopped by {name}\n"


def opened(fifo: Path) -> int | None:
    """Return a descriptor that writes to a pipe, when somebody reads from it."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def test_a_validation_that_is_stopped(starter: Starter, world: Path, tmp_path: Path) -> None:
    callbacks = at("validation_batch_start", signal_name="SIGTERM")
    config = tiny_runs.config(world, "sft", tmp_path / "run", trainer__callbacks=callbacks)
    shutil.copytree(world / "sft", tmp_path / "run")
    run = starter.start(tiny_runs.arguments("validate", config), tmp_path / "log")
    assert run.wait() == 75
    assert run.output.splitlines()[-1] == "minigpt: stopped by SIGTERM"
    assert "Traceback" not in run.output


def test_a_benchmark_that_is_ended_ends_what_it_measures(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(note)!r}).write_text(f'{{os.getpid()}} sleeps')\n"
        "time.sleep(1e6)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(BENCH), os.environ.get("PYTHONPATH", "")])
    benchmark = subprocess.Popen(
        [sys.executable, "-c", SPAWNING], env=os.environ | {"PYTHONPATH": path}
    )
    eventually(lambda: note.exists() and note.read_text().endswith("sleeps"))
    benchmark.send_signal(signal.SIGTERM)
    assert benchmark.wait(limit(60)) == 75
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text().split()[0]), 0)


@pytest.mark.faults
def test_llama_cpp_ends_with_its_benchmark(tmp_path: Path) -> None:
    size = tmp_path / "tiny.yaml"
    architecture = tiny_runs.ARCHITECTURE | {"max_positions": 256}
    size.write_text(json.dumps({"model": {"init_args": {"architecture": architecture}}}))
    options = ["--size", str(size), "--tokens", "3", "--repeats", "100000"]
    benchmark = subprocess.Popen([sys.executable, str(BENCH / "generate.py"), *options])
    running = eventually(
        lambda: [p for p in descendants(str(benchmark.pid)) if b"xllamacpp" in proc_file(p, "maps")]
    )
    benchmark.send_signal(signal.SIGTERM)
    assert benchmark.wait(limit(60)) == 75
    eventually(lambda: not any(proc_file(p, "cmdline") for p in running))


def descendants(process: str) -> list[str]:
    """Return the processes that a process has started, with those that these have started."""
    children = proc_file(process, f"task/{process}/children").decode().split()
    return children + [below for child in children for below in descendants(child)]


def proc_file(process: str, file: str) -> bytes:
    """Return what the kernel tells of a process; nothing when it has ended."""
    try:
        return Path("/proc", process, file).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
