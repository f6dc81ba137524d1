"""A checkpoint is gone on with by the run that it belongs to, in whatever number of processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from patience import eventually
from runs import Start, at, rows, until  # type: ignore[import-not-found]

from minigpt.model.pretrained import load_model
from minigpt.runs.checkpoints import STATE, newest_checkpoint


def cut(start: Start, stage: str = "sft", **changes: Any) -> None:
    callbacks = at("train_batch_start", 9, signal_name="SIGTERM")
    run = start(stage, "run", trainer__callbacks=callbacks, **changes)
    assert run.wait() == 75, run.output


def test_other_data_is_refused_unless_allowed(start: Start, world: Path, tmp_path: Path) -> None:
    cut(start)
    other = tmp_path / "other.jsonl"
    other.write_text("".join((world / "sft.jsonl").read_text().splitlines(keepends=True)[1:]))
    changes = {"data__init_args__train": str(other)}
    refused = start("sft", "run", "--ckpt_path", "auto", **changes)
    assert refused.wait() == 2
    assert (
        "minigpt: This is not the run that the checkpoint belongs to: data was " in refused.output
    )
    assert "--allow_changes true" in refused.output
    allowed = start("sft", "run", "--ckpt_path", "auto", "--allow_changes", "true", **changes)
    assert allowed.wait() == 0
    assert "Going on although this is another run: data was " in allowed.output


def test_the_same_data_elsewhere_is_the_same_run(start: Start, world: Path, tmp_path: Path) -> None:
    cut(start)
    copy = shutil.copy(world / "sft.jsonl", tmp_path / "sft.jsonl")
    moved = start("sft", "run", "--ckpt_path", "auto", data__init_args__train=str(copy))
    assert moved.wait() == 0, moved.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__init_args__seed": 5}, "seed was 0, is 5"),
        ({"data__init_args__tokens_per_batch": 300}, "tokens_per_batch was 256, is 300"),
        ({"trainer__accumulate_grad_batches": 3}, "batches_per_step was 2, is 3"),
        ({"trainer__gradient_clip_val": 0.5}, "gradient_clip_val was 1.0, is 0.5"),
        (
            {"trainer__gradient_clip_algorithm": "value"},
            "gradient_clip_val was 1.0, is 1.0 by value",
        ),
        ({"model__init_args__schedule__warmup": 2}, "schedule was name wsd, warmup 1.0, "),
    ],
)
def test_another_config_is_refused(start: Start, changes: dict[str, Any], message: str) -> None:
    cut(start)
    refused = start("sft", "run", "--ckpt_path", "auto", **changes)
    assert refused.wait() == 2
    assert message in refused.output
    assert "--allow_changes true" in refused.output


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("dpo", {"beta": 0.2, "loss": "cdpo", "label_smoothing": 0.1}, "beta was 0.1, is 0.2; "),
        ("pretrain", {"architecture__dropout": 0.1}, "dropout was 0.0, is 0.1. "),
    ],
)
def test_the_options_of_a_stage_are_compared(
    stage: str, changes: dict[str, Any], message: str, start: Start
) -> None:
    cut(start, stage)
    changes = {f"model__init_args__{name}": value for name, value in changes.items()}
    refused = start(stage, "run", "--ckpt_path", "auto", **changes)
    assert refused.wait() == 2
    assert message in refused.output
    neutral = {"spike": {"action": "warn"}, "sample_prompts": [], "activation_checkpointing": True}
    if stage == "dpo":
        assert "label_smoothing was 0.0, is 0.1; loss was sigmoid, is cdpo. " in refused.output
        changes = {f"model__init_args__{name}": value for name, value in neutral.items()}
        assert start(stage, "run", "--ckpt_path", "auto", **changes).wait() == 0


def test_weights_of_other_sizes_are_refused_in_words(
    start: Start, world: Path, tmp_path: Path
) -> None:
    cut(start, "pretrain")
    again, free = ("--ckpt_path", "auto"), ("--allow_changes", "true")
    wide = {"model__init_args__architecture__hidden_size": 64}
    tokenizer = tiny_runs.tokenizers.train([world / "pretrain.jsonl"], 300)
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    words = {"model__init_args__tokenizer": str(tmp_path / "tokenizer")}
    for changes, message in (
        (wide, "architecture was hidden_size 32, "),
        (words, "vocabulary was 320, is 300. "),
    ):
        for args in (again, again + free):
            refused = start("pretrain", "run", *args, **changes)
            assert refused.wait() == 2
            last = refused.output.rpartition("minigpt: ")[2]
            assert message in last
            assert "--allow_changes" not in last
    assert start("pretrain", "run", *again).wait() == 0


def test_a_base_of_another_size_is_refused_in_words(start: Start, world: Path) -> None:
    cut(start, "sft")
    other = {"model__init_args__init_from": str(world / "gpt2")}
    refused = start("sft", "run", "--ckpt_path", "auto", **other)
    assert refused.wait() == 2
    assert (
        "does not fit this model: the shape of lm.hf." in refused.output.rpartition("minigpt: ")[2]
    )


def test_another_method_is_refused_for_good(start: Start) -> None:
    cut(start)
    changes = {"model__init_args__lora": {"r": 2}}
    args = ("--ckpt_path", "auto", "--allow_changes", "true")
    refused = start("sft", "run", *args, **changes)
    assert refused.wait() == 2
    assert "method was adamw, all weights" in refused.output
    assert "--allow_changes" not in refused.output.rpartition("minigpt: ")[2]


def test_another_tokenizer_is_refused(start: Start, world: Path, tmp_path: Path) -> None:
    cut(start, "pretrain")
    tokenizer = tiny_runs.tokenizers.train([world / "pretrain.jsonl"], 320)
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    changes = {"model__init_args__tokenizer": str(tmp_path / "tokenizer")}
    refused = start("pretrain", "run", "--ckpt_path", "auto", **changes)
    assert refused.wait() == 2
    assert "tokenizer was " in refused.output


def test_a_changed_rate_is_refused_or_put_in_force(start: Start, tmp_path: Path) -> None:
    constant = {"warmup": 0, "decay": 0}
    cut(start, model__init_args__schedule=constant)
    changes = {
        "model__init_args__schedule": constant,
        "model__init_args__optimizer": {"lr": 0.001},
    }
    refused = start("sft", "run", "--ckpt_path", "auto", **changes)
    assert refused.wait() == 2
    assert "optimizer was lr 0.01" in refused.output
    args = ("--ckpt_path", "auto", "--allow_changes", "true")
    assert start("sft", "run", *args, **changes).wait() == 0
    rates = [row["lr"] for row in rows(tmp_path / "run") if "lr" in row]
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.001)


def test_the_second_run_in_a_directory_is_refused(start: Start, tmp_path: Path) -> None:
    first = start("sft", "run", trainer__callbacks=until(tmp_path / "go"))
    eventually(lambda: (tmp_path / "run" / "status.json").exists())
    for args in (("--overwrite", "true"), ("--ckpt_path", "auto")):
        second = start("sft", "run", *args)
        assert second.wait() == 2
        assert f"Another process is training in {tmp_path / 'run'}" in second.output
    (tmp_path / "go").touch()
    assert first.wait() == 0, first.output
    assert start("sft", "whole").wait() == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize("stage", ["lora", "dpo"])
def test_another_base_is_refused(stage: str, start: Start, world: Path, tmp_path: Path) -> None:
    cut(start, stage)
    other = tmp_path / "other"
    shutil.copytree(world / "sft" / "hf", other)
    model = load_model(other)
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    model.save_pretrained(str(other))
    changes = {"model__init_args__init_from": str(other)}
    refused = start(stage, "run", "--ckpt_path", "auto", **changes)
    assert refused.wait() == 2
    assert "base was " in refused.output


def test_checkpoints_hold_only_what_is_trained(start: Start, tmp_path: Path) -> None:
    sizes = {}
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "sft": ("sft", {}),
        "dpo": ("dpo", {}),
        "dpo-known": ("dpo", {"model__init_args__reference": "precomputed"}),
        "lora": ("lora", {}),
        "dpo-lora": ("dpo", {"model__init_args__lora": {"r": 8}}),
    }
    for name, (stage, changes) in runs.items():
        assert start(stage, name, **changes).wait() == 0
        checkpoint = newest_checkpoint(tmp_path / name)
        assert checkpoint is not None
        state = torch.load(checkpoint / STATE, weights_only=True)["state_dict"]
        sizes[name] = (len(state), (checkpoint / STATE).stat().st_size)
        if "lora" in name:
            assert all("lora_" in name for name in state)
    assert sizes["dpo"][0] == sizes["dpo-known"][0] == sizes["sft"][0]  # no reference
    assert sizes["dpo-known"][1] == pytest.approx(sizes["dpo"][1], rel=0.01)  # nor its log-probs
    assert max(sizes["lora"][1], sizes["dpo-lora"][1]) < 0.7 * sizes["sft"][1]


def noted(file: Path) -> list[dict[str, Any]]:
    return [{"class_path": "moments.Rows", "init_args": {"file": str(file)}}]


def consumed(file: Path) -> list[list[Any]]:
    """Return the rows of each micro-batch by optimizer step, then by process, in order."""
    records = sorted(
        (json.loads(line) for line in file.read_text().splitlines()), key=lambda m: m[:2]
    )
    return [[step, batch] for step, _, batch in records]


@pytest.mark.faults
def test_the_number_of_processes_may_change(start: Start, tmp_path: Path) -> None:
    one = {"trainer__max_steps": 12, "checkpoint": {"every": 4, "keep": 9}}
    two = {
        **one,
        "trainer__strategy": "ddp",
        "trainer__devices": 2,
        "trainer__accumulate_grad_batches": 1,
    }
    uninterrupted, ran = (noted(tmp_path / name) for name in ("rows-whole", "rows-run"))
    assert start("pretrain", "whole", trainer__callbacks=uninterrupted, **one).wait() == 0
    stop = at("train_batch_start", 5, signal_name="SIGTERM") + ran
    first = start("pretrain", "run", trainer__callbacks=stop, **one)
    assert first.wait() == 75
    stop = at("train_batch_start", 2, signal_name="SIGTERM") + ran
    second = start("pretrain", "run", "--ckpt_path", "auto", trainer__callbacks=stop, **two)
    assert second.wait() == 75, second.output
    assert "processes: 1 before, 2 now. The order of data is the same" in second.output
    third = start("pretrain", "run", "--ckpt_path", "auto", trainer__callbacks=ran, **one)
    assert third.wait() == 0, third.output
    assert "processes: 2 before, 1 now" in third.output
    resumed, other = consumed(tmp_path / "rows-run"), consumed(tmp_path / "rows-whole")
    assert resumed == other
    assert len({json.dumps(batch) for _, batch in other}) > 12
    logged, expected = (
        [row for row in rows(tmp_path / name) if "train/loss" in row] for name in ("run", "whole")
    )
    assert [row["step"] for row in logged] == [row["step"] for row in expected]
    for row, same in zip(logged, expected, strict=True):
        assert row["train/loss"] == pytest.approx(same["train/loss"], rel=1e-5)
        assert row["tokens_seen"] == same["tokens_seen"]
