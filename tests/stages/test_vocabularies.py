"""Tokenizers with holes, with large ids, with more tokens than the model has rows, or fewer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from tiny_runs import Fit
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.errors import DataError, ModelError
from minigpt.evaluate import likelihood
from minigpt.infer.engine import Engine, Sampling
from minigpt.model.pretrained import load_config, save_model

START = "model__init_args__init_from"
HIGH = 70_000  # an id that 16 bits do not hold
Start = Callable[..., str]


def spread(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Give the letter t and all merges high ids, with holes below them."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    words = spec["model"]["vocab"]
    moved = [word for word in words if word == "t" or (len(word) > 1 and not word.startswith("<|"))]
    words |= {word: HIGH + 2 * index for index, word in enumerate(moved)}
    return tokenizers.wrap(Tokenizer.from_str(json.dumps(spec)))


@pytest.fixture
def start(world: Path, tmp_path: Path) -> Start:
    """Save a tiny model with a tokenizer: `start(tokenizer, rows)`."""

    def save(tokenizer: PreTrainedTokenizerFast, rows: int) -> str:
        model = tiny.model("qwen3", vocab_size=rows, max_position_embeddings=128)
        save_model(model, tokenizer, tmp_path / "model")
        return str(tmp_path / "model")

    return save


@pytest.fixture
def base_tokenizer(world: Path) -> PreTrainedTokenizerFast:
    return tokenizers.load(world / "tokenizer")


def nats(model_dir: str, texts: Path) -> float:
    """The loss of texts by plain transformers, in nats per token."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer, total, count = tokenizers.load(model_dir), 0.0, 0
    for line in texts.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        ids = torch.tensor([[*ids, tokenizers.document_end(tokenizer)]])
        targets = ids.shape[1] - 1
        total += float(model(ids, labels=ids).loss.detach()) * targets
        count += targets
    return total / count


@pytest.mark.parametrize("stage", tiny_runs.STAGES)
def test_ids_with_holes_beyond_16_bits(
    stage: str,
    base_tokenizer: PreTrainedTokenizerFast,
    start: Start,
    fit: Fit,
    world: Path,
    tmp_path: Path,
) -> None:
    tokenizer = spread(base_tokenizer)
    assert len(tokenizer) < 400 < HIGH < tokenizers.id_count(tokenizer)
    model_dir = start(tokenizer, tokenizers.id_count(tokenizer))
    fit(
        stage, trainer__val_check_interval=3, model__init_args__tokenizer=None, **{START: model_dir}
    )
    texts = world / "pretrain_val.jsonl"
    engine = Engine.load(model_dir)
    got = likelihood.bits_per_byte(engine, str(texts), 64)
    assert got["loss"].value == pytest.approx(nats(model_dir, texts), rel=1e-4)
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    first = [tokenizer.decode(tokenizer(text)["input_ids"][:1]) for text in rows]  # not predicted
    assert got["bits_per_byte"].n == len("".join(rows)) - len("".join(first))
    engine.complete(["the cat"], Sampling(max_new_tokens=4, logprobs=3))


def test_a_new_model_has_a_row_for_each_id(
    base_tokenizer: PreTrainedTokenizerFast, fit: Fit, tmp_path: Path
) -> None:
    tokenizer = spread(base_tokenizer)
    tokenizer.save_pretrained(str(tmp_path / "spread"))
    fit("pretrain", model__init_args__tokenizer=str(tmp_path / "spread"))
    assert load_config(tmp_path / "run").vocab_size == tokenizers.id_count(tokenizer)


def test_an_added_token_without_a_row_is_fine_until_a_text_holds_it(
    base_tokenizer: PreTrainedTokenizerFast, start: Start, fit: Fit, world: Path, tmp_path: Path
) -> None:
    rows = tokenizers.id_count(base_tokenizer)
    base_tokenizer.add_tokens([AddedToken("[image]", special=False)])
    model_dir = start(base_tokenizer, rows)
    fit("sft", **{START: model_dir})
    assert load_config(tmp_path / "run").vocab_size == rows
    engine = Engine.load(tmp_path / "run")
    assert engine.complete(["the cat"], Sampling(max_new_tokens=3))[0].ids
    message = rf"the token '\[image\]' has the id {rows}, and the model embeds {rows} tokens"
    with pytest.raises(DataError, match=message):
        engine.complete(["the [image]"], Sampling())
    chats = [json.loads(line) for line in (world / "sft.jsonl").read_text().splitlines()]
    chats[2]["messages"][0]["content"] += " [image]"
    tiny_runs.write_jsonl(tmp_path / "odd.jsonl", chats)
    with pytest.raises(DataError, match=rf"odd\.jsonl:3: {message}"):
        fit(
            "sft", "other", data__init_args__train=str(tmp_path / "odd.jsonl"), **{START: model_dir}
        )
    tiny_runs.write_jsonl(tmp_path / "text.jsonl", [{"text": "a cat"}, {"text": "a [image]"}])
    with pytest.raises(DataError, match=rf"text\.jsonl:2: {message}"):
        likelihood.bits_per_byte(engine, str(tmp_path / "text.jsonl"), 64)


def test_another_models_tokenizer_is_refused(
    base_tokenizer: PreTrainedTokenizerFast, start: Start
) -> None:
    model_dir = start(base_tokenizer, tokenizers.id_count(base_tokenizer) - 1)
    with pytest.raises(ModelError, match="do not belong together"):
        Engine.load(model_dir)


def test_rows_beyond_the_tokenizer(
    base_tokenizer: PreTrainedTokenizerFast, start: Start, fit: Fit, tmp_path: Path
) -> None:
    rows = tokenizers.id_count(base_tokenizer) + 64
    model_dir = start(base_tokenizer, rows)
    fit("dpo", **{START: model_dir})
    assert load_config(tmp_path / "run").vocab_size == rows
    engine = Engine.load(model_dir)
    sampling = Sampling(max_new_tokens=40, temperature=5.0, logprobs=2)
    reply: Any = engine.complete(["the cat"], sampling)[0]
    assert max(reply.ids) >= rows - 64  # an id without a text: it adds none
    assert len(reply.logprobs) == len(reply.ids)
