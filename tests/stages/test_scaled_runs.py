"""Runs with `model.init_args.rope_scaling`, and samples that are longer than a model reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
from tiny_runs import Fit
from transformers import XLNetConfig, XLNetLMHeadModel

from minigpt.cli.trainer import run
from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ConfigError, ModelError
from minigpt.infer.engine import Engine
from minigpt.model.pretrained import load_config, save_model

STAGES = (*tiny_runs.STAGES, "kto", "grpo", "reward")
LONG: dict[str, Any] = {
    "data__init_args__max_length": 256,
    "data__init_args__tokens_per_batch": 512,
}
YARN = {"type": "yarn", "factor": 2.0}
SCALED: dict[str, Any] = {**LONG, "model__init_args__rope_scaling": YARN}


def long(stage: str) -> dict[str, Any]:
    """Return the options of long samples; GRPO's batches are counted in prompts."""
    if stage != "grpo":
        return LONG
    rewards = [{"kind": "length"}]
    return {"data__init_args__max_length": 256, "model__init_args__rewards": rewards}


@pytest.mark.parametrize("stage", STAGES)
def test_longer_samples_than_the_model_reads_are_refused(stage: str, fit: Fit) -> None:
    with pytest.raises(ConfigError, match="max_length is 256, but qwen3 reads at most 128 tokens"):
        fit(stage, **long(stage))


@pytest.mark.parametrize("stage", ["dpo", "kto", "grpo", "reward"])
def test_answers_share_no_prompt_beyond_the_original_length_of_dynamic_angles(
    stage: str, fit: Fit
) -> None:
    dynamic = {"type": "dynamic", "factor": 2.0}
    with pytest.raises(
        ConfigError, match=r"\(dynamic\) depend on a text's length above 128 tokens"
    ):
        fit(stage, model__init_args__rope_scaling=dynamic, **long(stage))


def test_learned_positions_are_a_limit(world: Path, tmp_path: Path, fit: Fit) -> None:
    tokenizer = tokenizers.load(world / "tokenizer")
    save_model(tiny.model("gpt2", n_positions=64), tokenizer, tmp_path / "gpt2")
    start = {"model__init_args__init_from": str(tmp_path / "gpt2")}
    with pytest.raises(ConfigError, match=r"gpt2 reads at most 64 tokens, .* Set it to 64\.$"):
        fit("sft", data__init_args__max_length=65, **start)
    fit("sft", data__init_args__max_length=64, **start)


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_a_scaled_run_measures_and_hands_on_its_scaling(
    stage: str, tmp_path: Path, world: Path, fit: Fit
) -> None:
    fit(stage, trainer__val_check_interval=3, **SCALED)
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    run_config = tiny_runs.config(world, stage, tmp_path / "run", **SCALED)
    measured = run(tiny_runs.arguments("validate", run_config)).trainer.callback_metrics
    got = {name: float(value) for name, value in measured.items()}
    assert got == pytest.approx(final, rel=1e-3, abs=1e-4)
    config = load_config(tmp_path / "run")
    assert config.rope_parameters["original_max_position_embeddings"] == 128
    engine = Engine.load(tmp_path / "run")
    assert engine.context == 256
    assert engine.model.config.rope_parameters == config.rope_parameters
    assert engine.tokenizer.model_max_length == 256


def test_a_kind_that_is_not_exact_is_refused_before_its_length(
    world: Path, tmp_path: Path, fit: Fit
) -> None:
    tokenizer = tokenizers.load(world / "tokenizer")
    sizes = {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48, "vocab_size": 400}
    model = XLNetLMHeadModel(XLNetConfig(**sizes))
    model.save_pretrained(tmp_path / "xlnet")
    tokenizers.save(tokenizer, tmp_path / "xlnet")
    with pytest.raises(ModelError, match=r"\(xlnet\) would be wrong: a token's logits depend on"):
        fit("sft", model__init_args__init_from=str(tmp_path / "xlnet"))


def test_sizes_beside_a_model_to_go_on_from(world: Path, fit: Fit) -> None:
    start = {"model__init_args__init_from": str(world / "pretrain")}
    fit("pretrain", model__init_args__tokenizer=None, **start)  # its own sizes
    start["model__init_args__architecture"] = {"hidden_size": 512, "layers": 8, "heads": 4}
    message = r"no effect beside init_from.*: hidden_size 512 \(the model has 32\), layers 8 \(the"
    with pytest.raises(ConfigError, match=message):
        fit("pretrain", "other", model__init_args__tokenizer=None, **start)
    start["model__init_args__architecture"] = {"rope_theta": 5e5}
    with pytest.raises(ConfigError, match=r"rope_theta 500000.0 \(the model has 10000.0\)"):
        fit("pretrain", "other", model__init_args__tokenizer=None, **start)
