"""The memory that a run says it will take, by what its tensors take; and a memory that is full."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import tiny_runs
import torch
from lightning.pytorch.callbacks import Timer
from tiny_runs import Fit
from torch import Tensor

from minigpt.__main__ import main
from minigpt.data.batch import collate
from minigpt.runs import memory, plan
from minigpt.runs.memory import ExpectedMemory, expected_memory
from minigpt.stages.base import BaseModule

WIDE = {"hidden_size": 64, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 160}
CLOSE = 0.25  # share by which the plan may be wrong


def stored_for_backward(module: BaseModule) -> int:
    """What autograd itself says it saves in the forward pass of the first full micro-batch."""
    batch = collate(module.data.first_samples(10**9), (0, 0))
    weights = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module.model(batch, per_answer=module.data.kind == "preference")
    total = sum(sizes.values())
    del loss
    return total


class Measurement(NamedTuple):
    """What a run expects, what autograd saves of a full micro-batch, and sizes of gradients."""

    expected: ExpectedMemory
    stored: int
    gradients: dict[int, int]


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[Measurement]:
    """What each run expects and takes."""
    measured: list[Measurement] = []

    def look(module: BaseModule) -> ExpectedMemory | None:
        random = torch.get_rng_state()
        expected = expected_memory(module)
        assert torch.equal(random, torch.get_rng_state())
        assert expected is not None
        gradients: dict[int, int] = {}
        for p in module.model.parameters():
            if p.requires_grad:
                p.register_hook(partial(note, gradients, id(p)))
        measured.append(Measurement(expected, stored_for_backward(module), gradients))
        torch.set_rng_state(random)
        return expected

    monkeypatch.setattr(plan, "expected_memory", look)
    monkeypatch.setattr(memory, "PROBE_TOKENS", 150)
    return measured


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_the_parts_are_those_of_the_tensors(
    stage: str, name: str, fit: Fit, measurements: list[Measurement]
) -> None:
    changes: dict[str, Any] = {"model__init_args__optimizer": {"name": name, "lr": 0.001}}
    changes["data__init_args__tokens_per_batch"] = 512
    if stage == "pretrain":
        changes["model__init_args__architecture"] = {**WIDE, "dropout": 0.1}
    cli = fit(stage, trainer__max_steps=2, **changes)
    ((expected, stored, gradients),) = measurements
    assert expected.gradients == sum(gradients.values())
    optimizer = cli.trainer.optimizers[0]
    states = (optimizer.muon if name == "muon" else optimizer).state.values()
    assert expected.optimizer == sum(size(t) for s in states for t in s.values() if t.ndim)
    assert (expected.update > 0) == (name == "muon")
    assert expected.activations == pytest.approx(stored, rel=CLOSE)
    parts = expected.before + expected.gradients + expected.optimizer
    computed = max(expected.activations, expected.update)
    assert expected.peak == parts + computed + expected.overhead
    assert expected.overhead == memory.cpu_overhead(expected.activations, "32-true", cli.model)


def note(gradients: dict[int, int], parameter: int, gradient: Tensor) -> None:
    gradients[parameter] = size(gradient)


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(("kind", "times"), [("text", 1), ("chat", 1), ("chat", 2)])
def test_what_a_cpu_keeps_is_bounded(kind: str, times: int) -> None:
    adapter = None if times == 1 else object()
    module: Any = SimpleNamespace(data=SimpleNamespace(kind=kind), adapter=adapter)
    overhead = memory.cpu_overhead
    assert overhead(1000, "32-true", module) == 2500
    assert overhead(10**12, "32-true", module) == memory.MOST_FREE[kind]  # type: ignore[index]
    assert overhead(1000, "bf16-mixed", module) == 2500 + times * memory.KERNELS[kind]  # type: ignore[index]


def test_activations_that_are_computed_twice_take_less(
    fit: Fit, measurements: list[Measurement]
) -> None:
    for twice in (False, True):
        changes = {"model__init_args__architecture": WIDE, "trainer__max_steps": 1}
        changes |= {"model__init_args__activation_checkpointing": twice}
        changes |= {"model__init_args__schedule": {"warmup": 0, "decay": 0}}
        fit("pretrain", f"run-{twice}", **changes)
    stored, recomputed = (run.expected.activations for run in measurements)
    assert recomputed < stored / 2


def test_the_plan_says_the_memory_and_the_time(
    fit: Fit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "STEPS_TIMED", 2)
    with caplog.at_level("INFO"):
        fit("sft", trainer__max_steps=5)
    assert "Memory: about " in caplog.text
    assert caplog.text.count("2 steps took ") == 1
    assert " to the end." in caplog.text


@pytest.mark.parametrize(
    ("seconds", "changes", "logged"),
    [
        (1, {}, None),  # neither 20 steps nor a minute
        (70, {}, "1 step took 70 s: about 3.5 min to the end."),
        (70, {"trainer__max_time": {"seconds": 90}}, "1 step took 70 s: trainer.max_time ends the"),
    ],
)
def test_the_time_is_told_after_a_minute(
    seconds: int,
    changes: dict[str, Any],
    logged: str | None,
    fit: Fit,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock starts behind the first step, and goes on by some seconds a step."""
    monkeypatch.setattr(plan, "time", SimpleNamespace(monotonic=count(0, seconds).__next__))
    with caplog.at_level("INFO"):
        fit("sft", trainer__max_steps=5, **changes)
    assert (" took " in caplog.text) == (logged is not None)
    assert logged is None or logged in caplog.text


def test_no_time_is_left_after_the_limit() -> None:
    timer = Timer(timedelta(seconds=-0.4))
    trainer: Any = SimpleNamespace(callbacks=[timer])
    assert plan.duration(plan.seconds_allowed(trainer)) == "0 s"
    assert plan.seconds_allowed(SimpleNamespace(callbacks=[])) == math.inf  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3 s"), (119, "119 s"), (150, "2.5 min"), (8000, "2.2 h")]
)
def test_times_are_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert plan.duration(seconds) == text


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "Halve data.init_args.tokens_per_batch, which is 256, and double trainer.accumulate"),
        (
            {"data__init_args__tokens_per_step": 512},
            "Halve data.init_args.tokens_per_batch, which is 256. Or",
        ),
        (
            {"data__init_args__tokens_per_batch": 100},
            "Halve data.init_args.max_length, which is 64, and data.init_args.tokens_per_batch",
        ),
    ],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_a_full_memory_is_said(
    error: RuntimeError,
    changes: dict[str, Any],
    remedy: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("minigpt.stages.sft.SFTModule.compute_loss", fails)
    config = tiny_runs.config(world, "sft", tmp_path / "run", **changes)
    assert main(tiny_runs.arguments("fit", config)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("minigpt: The memory is full; the peak was ")
    assert remedy in last
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)
    assert remedy in status["reason"]


def test_the_demo_in_a_run_that_is_not_the_demo(
    fit: Fit, repo_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    val = str(repo_root / "data" / "sft_val.jsonl")
    prompts = ["Where does Mira Tolan live?", "the cat"]
    limits = {"max_val_tokens": 200, "on_bad_row": "skip"}
    options = {f"data__init_args__{name}": value for name, value in limits.items()}
    fit("sft", data__init_args__val=val, model__init_args__sample_prompts=prompts, **options)
    assert f"the demo's data, an invented world: {val}. Give your own" in caplog.text
    assert "the demo's sample prompts (Where does Mira Tolan live?)" in caplog.text


def test_the_demos_data_for_a_domain_of_the_demo(
    fit: Fit, repo_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = ("lora/security.jsonl", "sft.jsonl")
    train = {str(repo_root / "data" / file): 1.0 for file in files}
    limits = {"data_limit": 50, "max_val_tokens": 200, "max_too_long_share": 1.0}
    options = {f"data__init_args__{name}": value for name, value in limits.items()}
    fit("sft", data__init_args__train=train, **options)
    assert "an invented world" not in caplog.text
