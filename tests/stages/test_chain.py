"""From raw JSONL through all stages, and from models of other families."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import tiny_runs
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minigpt.cli.trainer import run
from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import Message
from minigpt.infer.engine import Engine, Sampling
from minigpt.model.pretrained import load_model, save_model

STAGE = pytest.mark.parametrize("stage", tiny_runs.STAGES)
STAGE_METRICS = {
    "pretrain": {"bits_per_byte"},
    "sft": {"bits_per_byte"},
    "lora": {"bits_per_byte"},
    "dpo": {
        *("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"),
        *("logps/chosen", "logps/rejected"),
    },
}
COMMON = {"grad_norm", "lr", "tokens_seen", "tokens_per_s"}


@STAGE
def test_a_run_leaves_what_the_next_stage_needs(stage: str, world: Path) -> None:
    run_dir = world / stage
    names = {p.name for p in run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "hf"} <= names
    assert len(list((run_dir / "checkpoints").iterdir())) == 3
    reply = Engine.load(run_dir).complete(["the cat"], Sampling(max_new_tokens=3))[0]
    assert len(reply.ids) <= 3


@STAGE
def test_training_lowers_the_held_out_loss(stage: str, world: Path) -> None:
    summary = json.loads((world / stage / "summary.json").read_text())
    assert summary["final"]["val/loss"] < summary["before"]["val/loss"]
    assert summary["steps"] == 6
    if stage == "dpo":
        assert summary["before"]["val/loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert summary["before"]["val/rewards/margin"] == pytest.approx(0, abs=1e-4)


@STAGE
def test_a_stage_starts_where_the_one_before_ended(stage: str, world: Path) -> None:
    summary = json.loads((world / stage / "summary.json").read_text())
    if stage == "pretrain":
        assert summary["before"]["val/loss"] == pytest.approx(math.log(320), rel=0.1)
    elif stage == "lora":
        before = json.loads((world / "sft" / "summary.json").read_text())
        assert summary["before"]["val/loss"] == pytest.approx(before["final"]["val/loss"], rel=1e-5)
    start = load_model(world / ("pretrain" if stage in ("pretrain", "sft") else "sft"))
    end = load_model(world / stage)
    assert [n for n, _ in start.named_parameters()] == [n for n, _ in end.named_parameters()]


@STAGE
def test_metrics_and_tensorboard_hold_the_same_scalars(stage: str, world: Path) -> None:
    run_dir = world / stage
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row} - {"step", "time"}
    expected = {
        f"{part}/{name}" for part in ("train", "val") for name in {"loss", *STAGE_METRICS[stage]}
    }
    assert names == expected | COMMON
    events = EventAccumulator(str(run_dir)).Reload()
    assert names <= set(events.Tags()["scalars"])
    logged = [scalar.value for scalar in events.Scalars("train/loss")]
    assert logged == pytest.approx(tiny_runs.metrics(run_dir))
    assert len(logged) == 6
    held_out = [row["step"] for row in rows if "val/loss" in row]
    assert held_out[0] == 0  # before the first step
    assert len(held_out) == 3


@STAGE
def test_tensorboard_holds_samples_hyperparameters_and_the_layout(stage: str, world: Path) -> None:
    tags = set(EventAccumulator(str(world / stage)).Reload().Tags()["tensors"])
    assert {"samples/text_summary", "custom_scalars__config__"} <= tags
    hparams = "_hparams_/session_start_info"
    event_files = [f for f in (world / stage).rglob("events.out.tfevents.*") if has(f, hparams)]
    assert event_files


def has(file: Path, text: str) -> bool:
    return text.encode() in file.read_bytes()


def foreign(family: str, root: Path) -> Path:
    """A model of another family whose tokenizer knows no turns."""
    tokenizer = tokenizers.load(tiny.tokenizer(root / f"{family}-tokenizer", template=False))
    save_model(tiny.model(family, vocab_size=len(tokenizer)), tokenizer, root / family)
    return root / family


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "lora"])
def test_stages_start_from_other_families(
    family: str, stage: str, world: Path, tmp_path: Path
) -> None:
    start = foreign(family, tmp_path)
    config = tiny_runs.config(
        world,
        stage,
        tmp_path / "run",
        model__init_args__init_from=str(start),
        data__init_args__max_length=200,  # its tokens are shorter
        data__init_args__tokens_per_batch=400,
        trainer__val_check_interval=3,
    )
    module = run(tiny_runs.arguments("fit", config)).model
    validated = run(tiny_runs.arguments("validate", config))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    loss = float(validated.trainer.callback_metrics["val/loss"])
    assert loss == pytest.approx(summary["final"]["val/loss"], rel=1e-5)
    chat = [Message("user", "the cat")]
    engine = Engine.load(tmp_path / "run")
    assert engine.encode(chat) == module.engine().encode(chat)
    ids = torch.tensor([engine.encode(chat)])
    with torch.no_grad():
        trained = module.engine().model.eval()
        trained.config._attn_implementation = "sdpa"
        expected = trained(ids, use_cache=False).logits
        assert torch.allclose(engine.model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_pretraining_goes_on_from_a_model(world: Path, tmp_path: Path) -> None:
    config = tiny_runs.config(world, "pretrain", tmp_path / "run")
    config["model"]["init_args"] = {"init_from": str(world / "pretrain")}
    run(tiny_runs.arguments("fit", config))
    first = json.loads((tmp_path / "run" / "summary.json").read_text())["before"]["val/loss"]
    last = json.loads((world / "pretrain" / "summary.json").read_text())["final"]["val/loss"]
    assert first == pytest.approx(last, rel=1e-5)
