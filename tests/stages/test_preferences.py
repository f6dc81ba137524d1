"""DPO: the reference in all its forms, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_runs import Fit

from minigpt.cli.trainer import run
from minigpt.data.datamodule import PackedDataset
from minigpt.model.lora import Lora
from minigpt.model.packed_lm import PackedLM
from minigpt.model.pretrained import load_model
from minigpt.stages import reference
from minigpt.stages.dpo import DPOModule

LORA = {"r": 4, "dropout": 0.0}
# Each step takes the same pairs, so that its loss can be compared with the one before.
SAME_PAIRS = {"data__init_args__data_limit": 8, "data__init_args__tokens_per_batch": 1024}


def same(first: list[float], second: list[float]) -> bool:
    return len(first) == len(second) > 2 and first == pytest.approx(second, rel=1e-5)


def test_precomputed_and_live_reference_give_the_same_losses(tmp_path: Path, fit: Fit) -> None:
    extra = {"trainer__val_check_interval": 3}
    live = fit("dpo", "live", **extra).model
    cached = fit("dpo", "cached", model__init_args__reference="precomputed", **extra).model
    assert same(tiny_runs.metrics(tmp_path / "live"), tiny_runs.metrics(tmp_path / "cached"))
    for name in ("val/loss", "val/rewards/margin"):
        first, second = (tiny_runs.metrics(tmp_path / run, name) for run in ("live", "cached"))
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)
    assert live._frozen
    assert not cached._frozen
    assert len(cached._precomputed) == 58


def test_precomputed_is_live_in_bf16_as_well(
    tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is computed under the same autocast as in a step.

    Policy and reference are the same model, so that rewards are 0; up to rounding, where some
    CPUs multiply bf16 matrices of another batch in another order. A reference without autocast
    is the measure of that: it is off by the rounding of every layer.
    """

    def off_by(name: str, reference: str) -> float:
        more = {"trainer__precision": "bf16-mixed", "trainer__max_steps": 2}
        more["data__init_args__cache_dir"] = str(tmp_path / f"cache-{name}")
        fit("dpo", name, **more, model__init_args__reference=reference)
        chosen, rejected = (
            tiny_runs.metrics(tmp_path / name, f"train/rewards/{which}")[0]
            for which in ("chosen", "rejected")
        )
        return abs(chosen) + abs(rejected)

    live, cached = off_by("live", "model"), off_by("cached", "precomputed")
    monkeypatch.setattr(DPOModule, "_logprobs_of", DPOModule.reference_logprobs)
    fp32 = off_by("fp32", "precomputed")
    assert live == pytest.approx(0, abs=1e-6)
    assert cached < fp32 / 5


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_resumed_run_has_the_reference_that_it_began_with(
    lora: Any, tmp_path: Path, fit: Fit
) -> None:
    more = {**tiny_runs.RUN, "model__init_args__reference": "precomputed"}
    more |= {"model__init_args__lora": lora, "data__init_args__cache_dir": str(tmp_path / "cache")}
    fit("dpo", "run", **more)
    losses = tiny_runs.metrics(tmp_path / "run")
    (begun,) = (tmp_path / "run" / "checkpoints").glob("step=2*")
    for again in ("found", "computed anew"):
        fit("dpo", again, "--ckpt_path", str(begun), **more)
        resumed = tiny_runs.metrics(tmp_path / again)
        assert resumed == pytest.approx(losses[2:], rel=1e-6), again
        for file in (tmp_path / "cache").glob("*/reference-*.npz"):
            file.unlink()


def test_the_same_rows_in_two_files(world: Path, tmp_path: Path, fit: Fit) -> None:
    shutil.copy(world / "dpo.jsonl", tmp_path)
    copied = {"data__init_args__val": str(tmp_path / "dpo.jsonl")}
    module = fit("dpo", "run", **copied, model__init_args__reference="precomputed").model
    assert len(module._precomputed) == 96


def test_reference_logprobs_that_cannot_be_kept_are_used_all_the_same(
    tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minigpt.stages.reference.np.savez", full)
    cache = {"data__init_args__cache_dir": str(tmp_path / "cache")}
    fit("dpo", "run", **cache, model__init_args__reference="precomputed")
    assert len(tiny_runs.metrics(tmp_path / "run")) == 3
    assert "cannot be saved in" in caplog.text
    assert "No space left on device" in caplog.text
    files = {path.name for path in (tmp_path / "cache").glob("*/*")}
    assert files == {"meta.json", "sums.bin", "tokens.bin", "samples.bin", "lengths.bin"}


def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the pairs of every forward pass of the reference from here on."""
    pair_counts: list[int] = []
    plain = DPOModule.reference_logprobs

    def counted(self: DPOModule, batch: Any) -> Any:
        if not self._precomputed:
            pair_counts.append(batch.n_answers // 2)
        return plain(self, batch)

    monkeypatch.setattr(DPOModule, "reference_logprobs", counted)
    return pair_counts


@pytest.mark.parametrize("lora", [None, LORA])
def test_reference_logprobs_are_computed_once(
    lora: Any, tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {
        "model__init_args__reference": "precomputed",
        "model__init_args__lora": lora,
        "data__init_args__cache_dir": str(tmp_path / "cache"),
    }
    pair_counts = forwards(monkeypatch)
    fit("dpo", "first", **more)
    assert sum(pair_counts) == 58
    fit("dpo", "second", **more)
    assert sum(pair_counts) == 58
    assert tiny_runs.metrics(tmp_path / "first") == tiny_runs.metrics(tmp_path / "second")
    assert len(list((tmp_path / "cache").glob("*/reference-*.npz"))) == 2
    # Another start, or other rows, have other log-probs.
    fit("dpo", "third", **more, model__init_args__init_from=str(tmp_path / "first" / "hf"))
    assert sum(pair_counts) == 58 + 58
    fit("dpo", "fourth", **more, data__init_args__data_limit=20)
    assert sum(pair_counts) == 58 + 58 + 20 + 10
    fit("dpo", "fifth", **more, trainer__precision="bf16-mixed")
    assert sum(pair_counts) == 58 + 58 + 20 + 10 + 58


def test_no_flipped_bit_of_saved_logprobs_is_read(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    scores = np.linspace(-9, 0, 6, dtype=np.float32).reshape(3, 2)
    reference._write(path, scores)
    written = path.read_bytes()
    for bit in range(8 * len(written)):
        flipped = bytearray(written)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        read = reference._read(path, 3)
        assert read is None or np.array_equal(read, scores), bit


class Trap:
    """What a malicious file holds: code that runs when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("damage", ["cut off", "empty", "other rows", "code"])
def test_damaged_reference_logprobs_are_never_used(
    damage: str, tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {
        "model__init_args__reference": "precomputed",
        "data__init_args__cache_dir": str(tmp_path / "cache"),
    }
    fit("dpo", "first", **more)
    file = sorted((tmp_path / "cache").glob("dpo-*/reference-*.npz"))[0]
    content = file.read_bytes()
    if damage == "other rows":
        np.savez(file, scores=np.zeros((3, 2), np.float32))
    elif damage == "code":
        np.savez(file, scores=np.array([[Trap(tmp_path / "trapped")] * 2] * 48))
    else:
        file.write_bytes(content[:-9] if damage == "cut off" else b"")
    pair_counts = forwards(monkeypatch)
    fit("dpo", "second", **more)
    assert sum(pair_counts) == 48
    assert file.read_bytes() == content
    assert not (tmp_path / "trapped").exists()
    assert [p.name for p in file.parent.iterdir() if p.name.startswith(("tmp", "."))] == []


def test_a_share_of_a_file_draws_other_pairs_in_each_epoch(tmp_path: Path, fit: Fit) -> None:
    """Log-probs of all pairs are known, not only of those that the first epoch draws."""
    file = f"{fit('dpo', 'whole').datamodule.train}"
    more = {"trainer__max_steps": 12, "model__init_args__reference": "precomputed"}
    fit("dpo", "share", data__init_args__train={file: 0.5}, **more)
    assert len(tiny_runs.metrics(tmp_path / "share")) == 12


def test_adapter_off_equals_a_frozen_copy(
    tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("dpo", "off", model__init_args__lora=LORA)

    build_model = DPOModule.build_model

    def with_copy(self: DPOModule) -> PackedLM:
        lm = build_model(self)
        self._frozen.append(copy.deepcopy(lm).requires_grad_(False).eval())
        return lm

    monkeypatch.setattr(DPOModule, "build_model", with_copy)
    fit("dpo", "copy", model__init_args__lora=LORA)
    losses = tiny_runs.metrics(tmp_path / "off")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0]
    assert same(losses, tiny_runs.metrics(tmp_path / "copy"))


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_reference_of_a_run_from_an_adapter_has_that_adapter(
    lora: Any, world: Path, fit: Fit
) -> None:
    """It is merged first: what is switched off, or trained, is this run's own."""
    cli = fit("dpo", model__init_args__lora=lora, model__init_args__init_from=str(world / "lora"))
    data = cli.datamodule
    batch = next(iter(PackedDataset(data.order, data.train_subsets, 0, 0, 0, 1)))

    def logprobs(start: str) -> torch.Tensor:
        with torch.no_grad():
            scores: torch.Tensor = PackedLM(load_model(world / start))(batch, per_answer=True)
        return scores

    reference = cli.model.reference_logprobs(batch)
    assert torch.allclose(reference, logprobs("lora"), rtol=1e-4)
    assert not torch.allclose(reference, logprobs("sft"), rtol=1e-2)
    with torch.no_grad():
        assert not torch.allclose(reference, cli.model.model(batch, per_answer=True), rtol=1e-3)


def test_the_reference_stays_as_it_was(world: Path, fit: Fit) -> None:
    module = fit("dpo").model
    reference = module._frozen[0]
    start = load_model(world / "sft").state_dict()
    assert all(torch.equal(value, start[n]) for n, value in reference.hf.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    assert not reference.training
    parameter_ids = {id(p) for p in module.parameters()}
    assert not parameter_ids & {id(p) for p in reference.parameters()}
    assert len(module.state_dict()) == len(module.lm.state_dict())


@pytest.mark.parametrize(
    ("loss", "smoothing", "first"),
    [
        ("cdpo", 0.1, math.log(2)),
        ("cdpo", 0.3, math.log(2)),
        ("robust", 0.1, math.log(2)),
        ("hinge", 0.0, 1.0),
        ("ipo", 0.0, 25.0),
        ("sigmoid_norm", 0.0, math.log(2)),
        ("exo", 0.001, 2.761231),
        ("nca", 0.0, 1.386294),
        ("apo_zero", 0.0, 1.0),
        ("apo_down", 0.0, 1.0),
        ("sppo_hard", 0.0, 50.0),
    ],
)
def test_other_losses_train(
    loss: str, smoothing: float, first: float, tmp_path: Path, fit: Fit
) -> None:
    fit("dpo", model__init_args__loss=loss, model__init_args__label_smoothing=smoothing)
    losses = tiny_runs.metrics(tmp_path / "run")
    assert losses[0] == pytest.approx(first, rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo"])
def test_without_a_reference_no_model_is_kept_or_asked(
    loss: str, tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(DPOModule, "reference_logprobs")
    more = {"trainer__val_check_interval": 3, **SAME_PAIRS}
    module = fit("dpo", model__init_args__loss=loss, **more).model
    losses = tiny_runs.metrics(tmp_path / "run")
    assert losses[-1] < losses[0]
    assert module._frozen == []
    assert module.packed_models() == [module.model]
    assert not module.needs_base
    assert len(tiny_runs.metrics(tmp_path / "run", "val/rewards/accuracy")) > 0
    nll = tiny_runs.metrics(tmp_path / "run", "train/nll/chosen")
    assert bool(nll) == (loss != "simpo")


def test_a_start_that_is_gone_is_not_asked_for_without_a_reference(
    world: Path, tmp_path: Path
) -> None:
    """A finished run is validated by itself; with an adapter it needs its base."""
    shutil.copytree(world / "sft", tmp_path / "start")
    options: dict[str, Any] = {
        "model__init_args__loss": "simpo",
        "model__init_args__init_from": str(tmp_path / "start"),
        "trainer__val_check_interval": 3,
    }
    config = tiny_runs.config(world, "dpo", tmp_path / "run", **options)
    run(tiny_runs.arguments("fit", config))
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    shutil.rmtree(tmp_path / "start")
    measured = run(tiny_runs.arguments("validate", config)).trainer.callback_metrics
    assert float(measured["val/loss"]) == pytest.approx(final["val/loss"], rel=1e-3)
    assert DPOModule(init_from="start", loss="simpo", lora=Lora(r=4)).needs_base
    assert DPOModule(init_from="start", loss="nca").needs_base


def test_the_sft_term_is_added_to_any_loss(tmp_path: Path, fit: Fit) -> None:
    fit("dpo", "plain", **SAME_PAIRS)
    fit("dpo", "rpo", model__init_args__sft_weight=0.5, **SAME_PAIRS)
    plain, rpo = (tiny_runs.metrics(tmp_path / run)[0] for run in ("plain", "rpo"))
    nll = tiny_runs.metrics(tmp_path / "rpo", "train/nll/chosen")
    assert rpo == pytest.approx(plain + 0.5 * nll[0], rel=1e-5)
    assert nll[-1] < nll[0]
    assert tiny_runs.metrics(tmp_path / "plain", "train/nll/chosen") == []


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize("lora", [None, LORA])
def test_a_finished_run_is_measured_against_its_start(
    verb: str, lora: Any, world: Path, tmp_path: Path
) -> None:
    extra = {"model__init_args__lora": lora, "trainer__val_check_interval": 3}
    config = tiny_runs.config(world, "dpo", tmp_path / "run", **extra)
    run(tiny_runs.arguments("fit", config))
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    measured = run(tiny_runs.arguments(verb, config)).trainer.callback_metrics
    for name in ("val/loss", "val/rewards/margin", "val/rewards/accuracy"):
        assert float(measured[name]) == pytest.approx(final[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_activation_checkpointing_changes_no_loss(stage: str, tmp_path: Path, fit: Fit) -> None:
    extra = {"model__init_args__lora": LORA} if stage == "lora" else {}
    fit(stage, "plain", **extra)
    fit(stage, "again", model__init_args__activation_checkpointing=True, **extra)
    assert same(tiny_runs.metrics(tmp_path / "plain"), tiny_runs.metrics(tmp_path / "again"))
