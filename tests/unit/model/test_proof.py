"""The proof of a model's kind: what is exact packed, what in rows, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from minigpt.data import tokenizer as tokenizers
from minigpt.data.batch import collate
from minigpt.errors import ModelError
from minigpt.infer.engine import Engine, Sampling
from minigpt.model import conformance, shrink
from minigpt.model.cached import (
    EXPLICIT_POSITIONS,
    PADDED,
    SAME_LENGTH,
    UNCACHED,
    TransformersDecoder,
)
from minigpt.model.conformance import Conformance, conformance_of, require_conformance
from minigpt.model.packed_lm import PACKED, PackedLM, forward_rows, use_attention
from minigpt.model.pretrained import load_model, save_model
from minigpt.model.shrink import shrunk, tiny_models


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(conformance, "_PROVEN", {})
    return tmp_path / "cache" / "conformance"


def model_of(kind: str, **changes: Any) -> PreTrainedModel:
    with shrink.quiet():
        return next(iter(tiny_models(CONFIG_MAPPING[kind](**changes))))


def scores_alone(model: PreTrainedModel, texts: list[torch.Tensor]) -> list[float]:
    scores = []
    with use_attention(model, "eager"):
        for ids in texts:
            logp = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            scores.append(float(logp.gather(1, ids[1:, None]).sum()))
    return scores


@pytest.mark.parametrize(
    ("kind", "changes", "attention"),
    [
        ("llama", {}, PACKED),
        ("qwen3", {}, PACKED),
        ("gemma2", {}, PACKED),
        ("granite_swa", {}, PACKED),
        ("deepseek_v3", {}, PACKED),
        ("lfm2", {"full_attn_idxs": [2]}, "sdpa"),
        ("mamba", {}, "eager"),
        ("qwen3_next", {}, "sdpa"),
        ("llama4_text", {}, "sdpa"),
        ("bloom", {}, "eager"),
    ],
)
@torch.no_grad()
def test_every_kind_gives_its_own_losses(
    kind: str, changes: dict[str, Any], attention: str
) -> None:
    model = model_of(kind, **changes)
    lm = PackedLM(model)
    assert model.config._attn_implementation == attention
    rng = torch.Generator().manual_seed(1)
    texts = [torch.randint(shrink.SPECIAL, 100, (n,), generator=rng) for n in (19, 30, 11)]
    samples = tiny.texts([19, 30, 11])
    for sample, ids in zip(samples, texts, strict=True):
        sample.ids[:] = ids.numpy()
    scores = lm(collate(samples), per_answer=True)
    assert scores.tolist() == pytest.approx(scores_alone(model, texts), rel=2e-5)
    assert lm(collate(samples)).item() == pytest.approx(-float(scores.sum()), rel=1e-5)


def test_what_leaks_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        PackedLM(model_of("mamba"))
    messages = [r.getMessage() for r in caplog.records if "packed" in r.getMessage()]
    assert len(messages) == 1
    assert "MambaForCausalLM is not exact with packed samples" in messages[0]


def saved(kind: str, directory: Path, **changes: Any) -> Path:
    config = CONFIG_MAPPING[kind](**changes)
    values = {**shrunk(config.to_dict()), "vocab_size": tiny.VOCABULARY}
    small = AutoModelForCausalLM.from_config(type(config).from_dict(values))
    tokenizer = tokenizers.load(tiny.tokenizer(directory.with_name("tokenizer")))
    save_model(small, tokenizer, directory)
    return directory


def test_a_model_that_sees_what_comes_is_refused_everywhere(tmp_path: Path) -> None:
    directory = saved("bert", tmp_path / "bert")
    for load in (load_model, lambda p: load_model(p, "sdpa"), Engine.load):
        with pytest.raises(ModelError, match=r"bert.*is refused.*depend on the tokens after it"):
            load(directory)


def test_every_verb_refuses_a_model_that_sees_what_comes(
    minigpt: Callable[..., Any], tmp_path: Path
) -> None:
    directory = saved("bert", tmp_path / "bert")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the cat"}))
    for arguments in (
        ("generate", "--model", directory, "--text", "--prompt", "the cat"),
        ("evaluate", "--model", directory, "--text", text),
        ("serve", directory, "--port", "0"),
    ):
        outcome = minigpt(*arguments)
        assert outcome.status == 2
        assert "depend on the tokens after it" in outcome.err
        assert "Serving" not in outcome.out


def test_a_model_is_loaded_with_the_attention_that_is_exact(tmp_path: Path) -> None:
    directory = saved("gpt_neo", tmp_path / "neo")
    assert load_model(directory).config._attn_implementation == "eager"
    gemma = saved("gemma2", tmp_path / "gemma2")
    assert load_model(gemma).config._attn_implementation == PACKED
    assert Engine.load(gemma).model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kind", "changes", "mode"),
    [
        ("qwen3", {}, PADDED),
        ("opt", {}, PADDED),
        ("roberta", {}, SAME_LENGTH),  # learned positions, whose first is not 0
        ("bart", {}, SAME_LENGTH),  # learned positions, which it does not take as an argument
        ("whisper", {}, SAME_LENGTH),
        ("mamba", {}, SAME_LENGTH),
        (
            "bamba",
            {"attn_layer_indices": [2]},
            EXPLICIT_POSITIONS,
        ),  # begins to count anew at each token
        ("rwkv", {}, UNCACHED),
    ],
)
@torch.no_grad()
def test_texts_are_continued_in_the_fastest_way_that_is_exact(
    kind: str, changes: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    config = CONFIG_MAPPING[kind](**changes)
    values = {**shrunk(config.to_dict()), "vocab_size": tiny.VOCABULARY, "is_decoder": True}
    small = type(config).from_dict(values)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(small, attn_implementation="eager")
    shrink._add_noise(model.eval())
    engine = Engine(model, tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer")))
    assert engine.mode == mode
    prompts = ["the cat sat on", "the", "a dog"]
    replies = engine.complete(prompts, Sampling(max_new_tokens=4, temperature=0))
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = engine.encode(prompt)
        for token in reply.ids:
            logits = forward_rows(model, torch.tensor([ids]))[0, -1]
            assert logits[token] >= logits.max() - 1e-4
            ids.append(token)


def test_what_no_way_decodes_is_refused_to_decode_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward = TransformersDecoder._forward
    monkeypatch.setattr(TransformersDecoder, "_forward", lambda *args: forward(*args) + 1)
    model = tiny.model("qwen3")
    assert require_conformance(model, training=True).packed
    with pytest.raises(ModelError, match=r"no mode of decoding gives what its own forward does"):
        Engine(model, tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer")))


def test_a_cache_that_is_not_exact_is_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
    with caplog.at_level(logging.WARNING):
        Engine(model_of("rwkv"), tokenizer)
    assert any(
        "RwkvForCausalLM is not exact with a cache" in r.getMessage() for r in caplog.records
    )


def test_the_proof_is_saved(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG_MAPPING["llama"](hidden_size=64, num_attention_heads=4)
    first = conformance_of(config)
    assert first == Conformance(PACKED, "sdpa", PADDED)
    (file,) = cache.iterdir()
    monkeypatch.setattr(conformance, "_PROVEN", {})
    monkeypatch.setattr(conformance, "_by_tiny_models", lambda _: pytest.fail("proven again"))
    config.vocab_size += 8  # a grown vocabulary is of the same kind
    assert conformance_of(config) == first
    file.write_text("{")
    monkeypatch.setattr(conformance, "_PROVEN", {})
    monkeypatch.setattr(
        conformance, "_by_tiny_models", lambda _: Conformance("", "sdpa", UNCACHED, "new")
    )
    assert conformance_of(config) == Conformance("", "sdpa", UNCACHED, "new")
    assert json.loads(file.read_text())["problem"] == "new"


def test_the_proof_draws_nothing_and_leaves_the_model_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = model_of("qwen3").train()
    conformance.prove(model)
    conformance_of(CONFIG_MAPPING["llama"](hidden_size=96))
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert model.config._attn_implementation == "eager"


def test_a_model_that_cannot_be_made_small_is_tried_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: PreTrainedConfig, seed: int = 0) -> Any:
        raise ValueError("other sizes")

    monkeypatch.setattr(shrink, "tiny_models", fail)
    model = tiny.model("qwen3")
    assert conformance_of(model.config) is None
    assert require_conformance(model, training=True) == Conformance(PACKED, "sdpa", PADDED)
    monkeypatch.setattr(model, "forward", fail)
    monkeypatch.setattr(conformance, "_PROVEN", {})
    with pytest.raises(ModelError, match=r"qwen3.*does not read plain text: .*Error"):
        require_conformance(model, training=True)


def test_all_kinds_of_layers_are_in_the_tiny_model() -> None:
    config = CONFIG_MAPPING["bamba"](attn_layer_indices=[9, 18, 27])
    small = shrunk(config.to_dict())
    assert (small["num_hidden_layers"], small["attn_layer_indices"]) == (10, [8])
    gemma = CONFIG_MAPPING["gemma3_text"]()
    small = shrunk(gemma.to_dict())
    assert set(small["layer_types"]) == set(gemma.layer_types)
    assert small["sliding_window"] == shrink.SLIDING_WINDOW
    assert len(small["layer_types"]) == small["num_hidden_layers"]
