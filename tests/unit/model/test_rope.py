"""Limits of positions, and scaled rotary angles: as plain transformers computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
    XLNetConfig,
)

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import ConfigError
from minigpt.infer.engine import Engine, Sampling
from minigpt.infer.native import is_native
from minigpt.model.lora import Lora, add_adapter, save_adapter
from minigpt.model.packed_lm import PackedLM
from minigpt.model.pretrained import load_config, load_model, save_model
from minigpt.model.rope import RopeScaling, check_length, max_positions, scale_config, scale_rope

LENGTH = 16  # positions before scaling
KINDS = ("linear", "dynamic", "yarn")
IDS = torch.arange(3, 3 + 4 * LENGTH)[None]


def saved(root: Path, family: str, **sizes: Any) -> Path:
    """Save a tiny model with its tokenizer."""
    tokenizer = tokenizers.load(tiny.tokenizer(root / "tokenizer"))
    save_model(short(family, **sizes), tokenizer, root / "model")
    return root / "model"


def scaling(kind: str, **changes: Any) -> RopeScaling:
    return RopeScaling(**{"type": kind, "factor": 4.0, **changes})


def short(family: str, **sizes: Any) -> Any:
    return tiny.model(family, max_position_embeddings=LENGTH, **sizes)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(ids, use_cache=False).logits
    return out[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral"])
def test_a_saved_model_is_scaled_in_plain_transformers(
    family: str, kind: str, tmp_path: Path
) -> None:
    model = short(family)
    before = logits(model, IDS)
    scale_rope(model, scaling(kind))
    assert max_positions(model.config) == 4 * LENGTH
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for ids in (IDS, IDS[:, : LENGTH - 2]):
        assert torch.allclose(logits(model, ids), logits(plain, ids), atol=1e-5)
    assert not torch.allclose(logits(plain, IDS), before, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_have_the_angles_of_each_alone(kind: str) -> None:
    lengths = [60, 7, 40, 17, 16, 64, 1]
    model = short("qwen3")
    scale_rope(model, scaling(kind))
    batch = tiny.batch(lengths)
    expected = torch.zeros(())
    for sample in tiny.texts(lengths):
        plain = short("qwen3")  # a new one: transformers remembers the longest text
        scale_config(plain.config, scaling(kind))
        fresh = type(plain)(plain.config).eval()
        fresh.load_state_dict(plain.state_dict())
        ids = torch.tensor(sample.ids.astype(int))
        logp = logits(fresh, ids[None]).log_softmax(-1)[:-1]
        expected -= logp.gather(1, ids[1:, None]).sum()
    with torch.no_grad():
        got = PackedLM(model)(batch)
    assert float(got) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_replies_are_those_of_plain_transformers(kind: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, "llama")
    model = load_model(directory, "sdpa")
    scale_rope(model, scaling(kind))
    engine = Engine(model.eval(), Engine.load(directory).tokenizer)
    assert is_native(model) is (kind != "dynamic")
    assert engine.context == 4 * LENGTH
    model.save_pretrained(tmp_path / "scaled")
    texts = ["the cat sat", "the dog", "the cat sat on the mat and the dog sat on the log " * 2]
    replies = engine.complete(texts, Sampling(max_new_tokens=12))
    for text, reply in zip(texts, replies, strict=True):
        ids = engine.encode(text)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled", dtype=torch.float32)
        for token in reply.ids:
            assert int(logits(plain, torch.tensor([ids]))[-1].argmax()) == token
            ids.append(token)


def test_an_adapter_brings_the_scaling_of_its_base(tmp_path: Path) -> None:
    directory = saved(tmp_path, "qwen3")
    model = load_model(directory, "sdpa")
    scale_rope(model, scaling("yarn"))
    adapted = add_adapter(model, Lora(), str(directory))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    save_adapter(adapted, Engine.load(directory).tokenizer, tmp_path / "adapter")
    expected = logits(adapted.eval(), IDS)
    merged = load_model(tmp_path / "adapter", "sdpa").eval()
    assert torch.allclose(logits(merged, IDS), expected, atol=1e-3)
    beside = Engine.load(directory, tmp_path / "adapter", merged=False)
    assert torch.allclose(logits(beside.model, IDS), expected, atol=1e-4)
    assert beside.context == max_positions(load_config(tmp_path / "adapter")) == 4 * LENGTH


def test_older_stacks_find_the_scaling(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    config = json.loads(
        (saved(tmp_path, "qwen3", rope_parameters=rope) / "config.json").read_text()
    )
    expected = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": LENGTH}
    assert config["rope_scaling"] == expected
    assert config["rope_theta"] == 1e4
    assert load_config(tmp_path / "model").rope_parameters == {**rope, **expected}


def test_partial_rotary_angles_stay_partial() -> None:
    config = PhiConfig(max_position_embeddings=LENGTH, partial_rotary_factor=0.5)
    scale_config(config, scaling("yarn"))
    assert config.rope_parameters["partial_rotary_factor"] == 0.5


def test_the_original_length_can_be_given() -> None:
    for kind, positions in (("linear", 32), ("yarn", 32), ("dynamic", 8)):
        config = Qwen3Config(max_position_embeddings=LENGTH)
        scale_config(config, scaling(kind, original_max_position_embeddings=8))
        assert config.max_position_embeddings == positions
        assert max_positions(config) == 32


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_scaled_stays_as_it_is(kind: str) -> None:
    model = short("qwen3")
    scale_rope(model, scaling(kind))
    before = model.config.to_dict()
    scale_rope(model, scaling(kind))  # the next stage, with the same option
    assert model.config.to_dict() == before
    with pytest.raises(ConfigError, match=f"scaled already \\({kind}, factor 4.0\\)"):
        scale_rope(model, scaling(kind, factor=2.0))


def test_models_that_cannot_be_scaled() -> None:
    for family in ("gpt2",):
        with pytest.raises(ConfigError, match="gpt2 has no rotary positions"):
            scale_rope(tiny.model(family), scaling("yarn"))


@pytest.mark.parametrize(
    "changes", [{"factor": 1.0}, {"factor": 0.5}, {"original_max_position_embeddings": 0}]
)
def test_scalings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"rope_scaling\.factor must be above 1"):
        scaling("yarn", **changes)


def test_lengths_beyond_the_positions_are_refused() -> None:
    for config in (GPT2Config(n_positions=128), OPTConfig(max_position_embeddings=128)):
        check_length(config, 128)
        message = f"max_length is 129, but {config.model_type} reads at most 128 tokens"
        with pytest.raises(ConfigError, match=rf"{message}, as its config says\. Set it to 128\.$"):
            check_length(config, 129)
    with pytest.raises(ConfigError, match=r"rope_scaling, such as \{type: yarn, factor: 3\.0\}"):
        check_length(Qwen3Config(max_position_embeddings=100), 201)


def test_a_negative_length_is_no_limit() -> None:
    check_length(XLNetConfig(), 10**6)


def test_answers_share_a_prompt_up_to_the_original_length_of_dynamic_angles() -> None:
    config = Qwen3Config(max_position_embeddings=LENGTH)
    scale_config(config, scaling("dynamic"))
    check_length(config, 4 * LENGTH)
    check_length(config, LENGTH, shares_prompts=True)
    with pytest.raises(ConfigError, match=r"\(dynamic\) depend on a text's length above 16"):
        check_length(config, LENGTH + 1, shares_prompts=True)
