"""Runs of models whose layers carry a state: convolutions beside attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_runs import Fit
from transformers import AutoModelForCausalLM

from minigpt.data import tokenizer as tokenizers
from minigpt.infer.engine import Engine, Reply
from minigpt.model.pretrained import save_model


def test_a_hybrid_trains_by_rows_and_answers_its_sample_prompts(
    world: Path,
    fit: Fit,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    tokenizer = tokenizers.load(world / "tokenizer")
    sizes = {"vocab_size": tokenizers.id_count(tokenizer), "max_position_embeddings": 128}
    hybrid = tiny.model("lfm2", layer_types=["conv", "full_attention"], **sizes)
    save_model(hybrid, tokenizer, tmp_path / "lfm2")
    answered: list[list[Reply]] = []
    complete = Engine.complete

    def note(self: Engine, *asked: Any) -> list[Reply]:
        answered.append(complete(self, *asked))
        return answered[-1]

    monkeypatch.setattr(Engine, "complete", note)
    prompts = ["the cat", "a dog sits on the mat and then", "sun"]
    cli = fit(
        "sft",
        model__init_args__init_from=str(tmp_path / "lfm2"),
        model__init_args__sample_prompts=prompts,
        model__init_args__sampling={"max_new_tokens": 6, "temperature": 0.0},
        trainer__max_steps=6,
        trainer__val_check_interval=3,
    )
    assert "Lfm2ForCausalLM is not exact with packed samples" in caplog.text
    assert not cli.model.model.packed
    assert len(answered) == 3  # before the first step, and twice
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").eval()
    for prompt, reply in zip(prompts, answered[-1], strict=True):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        right = plain.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
        new = right[0, len(ids) :].tolist()
        assert reply.ids
        assert reply.ids == new[: len(reply.ids)]
