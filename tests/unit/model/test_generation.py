"""The generation config of a model survives saving, with every token that ends a reply."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.model.generation import generation_config
from minigpt.model.pretrained import load_model, save_model


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    return tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))


def model_with(**fields: Any) -> PreTrainedModel:
    """A model that came with such a generation_config.json."""
    model = tiny.model("llama")
    model.generation_config = GenerationConfig.from_dict(fields)
    return model


def test_a_list_of_ends_and_other_fields_survive(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = model_with(
        eos_token_id=[7, 9], bos_token_id=2, do_sample=True, temperature=0.6, top_p=0.9
    )
    save_model(model, tokenizer, tmp_path / "one")
    save_model(load_model(tmp_path / "one"), tokenizer, tmp_path / "two")
    for name in ("one", "two"):
        saved = json.loads((tmp_path / name / "generation_config.json").read_text())
        ends = tokenizer.convert_tokens_to_ids([tokenizers.END_OF_TEXT, tokenizers.TURN_END])
        assert saved.pop("eos_token_id") == sorted({7, 9, *ends})
        assert saved.pop("pad_token_id") == tokenizer.pad_token_id
        del saved["transformers_version"]
        expected = {"bos_token_id": 2, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
        assert saved == expected


def test_fields_that_contradict_each_other_are_left_out(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = model_with(eos_token_id=7, temperature=0.6, top_k=20, repetition_penalty=1.1)
    save_model(model, tokenizer, tmp_path / "hf")
    saved = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (saved.temperature, saved.top_k) == (None, None)
    assert saved.repetition_penalty == 1.1


def test_padding_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.pad_token = None  # type: ignore[assignment]
    assert generation_config(model_with(pad_token_id=5), tokenizer).pad_token_id == 5
    config = generation_config(model_with(pad_token_id=-1), tokenizer)
    ends: Any = config.eos_token_id
    assert config.pad_token_id == ends[0]
