"""Replies and exams of models whose turns do not end with eos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from transformers import GenerationConfig

from minigpt.data import tokenizer as tokenizers
from minigpt.data.exam import Item
from minigpt.data.formats import Message
from minigpt.infer.engine import Engine, Sampling
from minigpt.infer.examine import shares, sit

END = "<end_of_turn>"
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class Scripted:
    """Says the same tokens to everyone, whatever is asked."""

    joins = False

    def __init__(self, script: Sequence[int], vocabulary: int) -> None:
        self.script, self.vocabulary, self.said = script, vocabulary, 0

    def admit(self, prompts: Sequence[list[int]]) -> Tensor:
        self.said = 0
        return self.step([0] * len(prompts))

    def step(self, tokens: Sequence[int]) -> Tensor:
        logits = torch.zeros(len(tokens), self.vocabulary)
        logits[:, self.script[self.said]] = 9.0
        self.said += 1
        return logits

    def drop(self, row: int) -> None:
        """Nothing is kept."""


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """A Gemma-like model: eos is another token than the one that ends its turns."""
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<start_of_turn>", END, "<|observation|>"]}
    )
    tokenizer.eos_token, tokenizer.chat_template = tokenizers.END_OF_TEXT, GEMMA
    model = tiny.model("llama")
    own = tokenizer.convert_tokens_to_ids("<|observation|>")
    model.generation_config = GenerationConfig(eos_token_id=[0, own])
    return Engine(model, tokenizer)


def say(engine: Engine, text: str) -> None:
    """Make the engine say a text, special tokens included, and then go on."""
    script = engine.tokenizer.encode(text, add_special_tokens=False)
    runner = Scripted([*script, *engine.tokenizer.encode("cat" * 20)], tiny.VOCABULARY)
    engine.runner = lambda: runner  # type: ignore[method-assign, assignment, return-value]


@pytest.mark.parametrize("end", [END, tokenizers.END_OF_TEXT, "<|observation|>"])
def test_any_end_token_ends_a_right_reply(engine: Engine, end: str) -> None:
    say(engine, f"the mat{end}")
    items = [Item(str(i), "mats", (Message("user", "where?"),), "the mat") for i in range(3)]
    assert shares(sit(engine, items, Sampling(max_new_tokens=12))) == {"mats": 1.0}
    reply = engine.complete(["where?"], Sampling(max_new_tokens=12))[0]
    assert (reply.text, reply.finish) == ("the mat", "stop")
    assert reply.ended_by == engine.tokenizer.convert_tokens_to_ids(end)


def test_a_reply_that_is_cut_off_is_not_right(engine: Engine) -> None:
    say(engine, "the mat")
    items = [Item("1", "mats", (Message("user", "where?"),), "the mat")]
    size = len(engine.tokenizer.encode("the mat"))
    (judged,) = sit(engine, items, Sampling(max_new_tokens=size))
    assert (judged.reply, judged.fits, judged.right) == ("the mat", True, False)
