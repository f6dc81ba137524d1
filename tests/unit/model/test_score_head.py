"""Reward models: a score at each answer's last token, the same as plain transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from minigpt.data import tokenizer as tokenizers
from minigpt.data.batch import collate
from minigpt.data.chat import install_template
from minigpt.errors import ModelError, TokenizerError
from minigpt.model import shrink
from minigpt.model.lora import Lora, add_adapter
from minigpt.model.optimizer import OptimizerOptions, build_optimizer
from minigpt.model.packed_lm import PACKED, use_attention
from minigpt.model.score_head import (
    PackedReward,
    choose_padding,
    reward_model_class,
    with_score_head,
)

SHAPES = [(9, 5, 7), (3, 1, 2), (0, 11, 0), (64, 20, 12)]


def tiny_of(kind: str) -> PreTrainedModel:
    if kind in tiny.FAMILIES:
        return tiny.model(kind)
    with shrink.quiet():
        return next(iter(shrink.tiny_models(CONFIG_MAPPING[kind]())))


def scored_alone(model: PreTrainedModel, samples: list[Any]) -> list[float]:
    """The scores that transformers' own class gives to each answer behind its prompt."""
    scores = []
    with use_attention(model, "eager"):
        for sample in samples:
            prompt, start = sample.ids[: sample.prompt].tolist(), sample.prompt
            for length in sample.answers:
                ids = torch.tensor([[*prompt, *sample.ids[start : start + length].tolist()]])
                scores.append(float(model(input_ids=ids).logits.squeeze()))
                start += length
    return scores


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("qwen3", PACKED), ("gpt2", PACKED), ("gemma2", PACKED), ("bloom", "eager")],
)
@torch.no_grad()
def test_packed_scores_are_those_of_each_answer_alone(kind: str, attention: str) -> None:
    model = with_score_head(tiny_of(kind)).eval()
    model.score.weight.normal_()  # of a size at which an error shows
    model.config.pad_token_id = None
    lm = PackedReward(model)
    assert model.config._attn_implementation == attention
    samples = tiny.preferences(SHAPES)
    for sample in samples:
        sample.ids[:] = shrink.SPECIAL + sample.ids % 100
    scores = lm(collate(samples, read_last=True))
    assert len(scores) == sum(len(sample.answers) for sample in samples)
    assert scores.tolist() == pytest.approx(scored_alone(model, samples), rel=2e-5, abs=2e-5)


def test_a_model_that_has_a_score_head_retains_it() -> None:
    model = with_score_head(tiny.model("llama"))
    assert with_score_head(model) is model
    assert {name for name, _ in model.named_parameters() if "score" in name} == {"score.weight"}
    assert all(not p.is_meta for p in model.parameters())


def test_families_without_a_class_of_reward_models_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"no \.\.\.ForSequenceClassification.*family cohere\)"):
        reward_model_class(tiny.model("cohere").config)
    with pytest.raises(ModelError, match=r"reads sequences otherwise.*modernbert-decoder\)"):
        with_score_head(tiny_of("modernbert-decoder"))


def test_the_head_is_trained_by_adamw_and_beside_an_adapter() -> None:
    model = with_score_head(tiny.model("llama"))
    optimizer = build_optimizer(PackedReward(model), OptimizerOptions(name="muon"))
    of_adamw = [g["params"] for g in optimizer.param_groups if g["by"] == "adamw"]
    assert any(p is model.score.weight for group in of_adamw for p in group)
    adapted = add_adapter(model, Lora(r=2), "base")
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }
    assert not any("score" in name for name in trained if "lora" in name)


def test_padding_ends_no_answer(tmp_path: Path) -> None:
    """Or transformers would read the score at the token before the last."""
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "own"))
    choose_padding(tokenizer)
    assert tokenizer.pad_token == tokenizers.PAD
    plain = tokenizers.load(tiny.tokenizer(tmp_path / "plain", template=False))
    install_template(plain)
    plain.pad_token = plain.eos_token
    choose_padding(plain)
    assert plain.pad_token == tokenizers.END_OF_TEXT
    alone = tokenizers.load(tiny.tokenizer(tmp_path / "alone", template=False))
    alone.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    with pytest.raises(TokenizerError, match=r"only special token is <\|endoftext\|>"):
        choose_padding(alone)
