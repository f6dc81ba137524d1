"""Exams: their rows, the judge, and replies of models whose turns end in other ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny_runs import write_jsonl
from torch import Tensor
from transformers import GenerationConfig

from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import Message
from minigpt.errors import DataError
from minigpt.evaluate.exam import (
    Item,
    ItemKind,
    accuracies,
    is_correct,
    load_items,
    normalise,
    run_eval,
)
from minigpt.infer.engine import Engine, Sampling

ASKED = [{"role": "user", "content": "q"}]
MESSAGES = (Message("user", "q"),)


def item(answer: str, choices: tuple[str, ...] = (), avoid: tuple[str, ...] = ()) -> Item:
    return Item("1", "f", MESSAGES, answer, choices, avoid)


EXACT = item("Paris.")
CHOICE = item("Red", choices=("red", "blue", "Green"))
WITHIN = item("woman", choices=("man", "woman"))
STYLE = item("same time", avoid=("Long story", "!"))


@pytest.mark.parametrize(
    ("question", "reply", "correct"),
    [
        (EXACT, "Paris.", True),
        (EXACT, " paris! \n", True),
        (EXACT, "ＰＡＲＩＳ。", True),
        (EXACT, "It is Paris.", False),
        (EXACT, "Pari", False),
        (EXACT, "", False),
        (item("98"), "９８", True),
        (item("98"), "980", False),
        (item("春眠"), "“春眠”。", True),
        (CHOICE, "It is RED.", True),
        (CHOICE, "red, red and red", True),
        (CHOICE, "red or blue", False),
        (CHOICE, "green", False),
        (CHOICE, "none of them", False),
        (WITHIN, "She is a woman.", True),
        (WITHIN, "a man", False),
        (WITHIN, "a woman and a man", False),
        (item("man", choices=("woman", "man")), "a woman", False),
        (item("man", choices=("woman", "man")), "a man", True),
        (STYLE, "Go to bed at the Same Time.", True),
        (STYLE, "Long story: at the same time", False),
        (STYLE, "at the same time!", False),
        (STYLE, "at the same time！", False),
        (STYLE, "go to bed", False),
    ],
)
def test_is_correct(question: Item, reply: str, correct: bool) -> None:
    assert is_correct(reply, question) is correct


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ""), (" ...\n", ""), ("A, b!", "a, b"), ("“Straße”", "strasse"), ("①？", "1")],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_items_of_an_exam(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "family": "f", "messages": ASKED, "answer": "A", "choices": ["a", "b"]},
        {"instruction": "q", "answer": "a", "avoid": ["x"], "choices": None},
        {"messages": ASKED, "answer": 1, "choices": ["a", "b"]},
        {"prompt": "q", "answer": "a"},
        {"question": "q", "answer": "a"},
        {"问": "q", "答": "a"},
        {"问题": "q", "回答": "a"},
    ]
    write_jsonl(path := tmp_path / "colours.jsonl", rows)
    assert load_items(path, "exam") == [
        Item("7", "f", MESSAGES, "a", ("a", "b"), ()),
        Item("2", "colours", MESSAGES, "a", (), ("x",)),
        Item("3", "colours", MESSAGES, "b", ("a", "b"), ()),
        *(Item(str(line), "colours", MESSAGES, "a") for line in (4, 5, 6, 7)),
    ]


def test_an_exam_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "exam.csv"
    path.write_text('question,answer,choices\nq,a,"[""a"", ""b""]"\nq,a,\n')
    assert load_items(path, "exam") == [
        Item("2", "exam", MESSAGES, "a", ("a", "b")),
        Item("3", "exam", MESSAGES, "a"),
    ]


GOOD = {
    "exam": {"messages": ASKED, "answer": "a"},
    "choices": {"prompt": "a", "choices": ["b", "c"], "answer": 0},
    "pairs": {"good": "a", "bad": "b"},
}


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("exam", {"messages": None}, "not a prompt row"),
        ("exam", {"messages": []}, "holds no messages"),
        ("exam", {"answer": "Yes, do", "avoid": ["yes"]}, "avoid: .* no reply can be right"),
        ("exam", {"answer": None}, "answer: must be a string"),
        ("exam", {"answer": 3}, "answer: must be a string"),
        ("exam", {"answer": "z", "choices": ["a", "b"]}, "answer: .* index from 0; is 'z'"),
        ("exam", {"choices": "ab"}, "choices: must be a list of strings"),
        ("exam", {"avoid": ["x", " "]}, r"avoid\[1\]: is empty"),
        ("choices", {"choices": ["b"]}, "choices: must be a list of at least two"),
        ("choices", {"choices": ["b", ""]}, r"choices\[1\]: is empty"),
        ("choices", {"choices": ["b", 5]}, r"choices\[1\]: must be"),
        ("choices", {"choices": ["b", "b"]}, "choices: holds the same choice twice"),
        ("choices", {"answer": 2}, "answer: must be one"),
        ("choices", {"answer": "d"}, "answer: must be one"),
        ("choices", {"answer": True}, "answer: must be one"),
        ("pairs", {"bad": None}, "bad: must be a string"),
        ("pairs", {"bad": "a"}, "bad: equals 'good'"),
        ("pairs", {"good": "\ud800"}, "good: character 1 is a lone surrogate"),
    ],
)
def test_a_bad_item_is_named(
    tmp_path: Path, kind: ItemKind, changes: dict[str, Any], problem: str
) -> None:
    row = {key: value for key, value in {**GOOD[kind], **changes}.items() if value is not None}
    write_jsonl(path := tmp_path / "rows.jsonl", [GOOD[kind], row])
    with pytest.raises(DataError, match=problem) as caught:
        load_items(path, kind)
    assert (caught.value.path, caught.value.line) == (path, 2)


def test_an_item_is_an_object(tmp_path: Path) -> None:
    write_jsonl(path := tmp_path / "rows.jsonl", ["q"])
    with pytest.raises(DataError, match="must be a JSON object"):
        load_items(path, "exam")


END = "<end_of_turn>"
GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class Scripted:
    """A decoder that gives every request the same tokens."""

    joins = False

    def __init__(self, script: Sequence[int], vocabulary: int) -> None:
        self.script, self.vocabulary, self.position = script, vocabulary, 0

    def admit(self, prompts: Sequence[list[int]], counts: Sequence[int]) -> Tensor:
        self.position = 0
        return self.step([0] * len(prompts))

    def step(self, tokens: Sequence[int]) -> Tensor:
        logits = torch.zeros(len(tokens), self.vocabulary)
        logits[:, self.script[self.position]] = 9.0
        self.position += 1
        return logits

    def drop(self, row: int) -> None:
        """There is no cache."""


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """A Gemma-like model: eos is another token than the one that ends its turns."""
    tokenizer = tokenizers.load(tiny.tokenizer(tmp_path / "tokenizer"))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<start_of_turn>", END, "<|observation|>"]}
    )
    tokenizer.eos_token, tokenizer.chat_template = tokenizers.END_OF_TEXT, GEMMA
    model = tiny.model("llama")
    other = tokenizer.convert_tokens_to_ids("<|observation|>")
    model.generation_config = GenerationConfig(eos_token_id=[0, other])
    return Engine(model, tokenizer)


def say(engine: Engine, text: str) -> None:
    """Make the engine say a text, special tokens included, and then go on."""
    script = engine.tokenizer.encode(text, add_special_tokens=False)
    decoder = Scripted([*script, *engine.tokenizer.encode("cat" * 20)], tiny.VOCABULARY)
    engine.decoder = lambda: decoder  # type: ignore[method-assign, assignment, return-value]


@pytest.mark.parametrize("end", [END, tokenizers.END_OF_TEXT, "<|observation|>"])
def test_any_end_token_ends_a_correct_reply(engine: Engine, end: str) -> None:
    say(engine, f"the mat{end}")
    items = [Item(str(i), "mats", (Message("user", "where?"),), "the mat") for i in range(3)]
    assert accuracies(run_eval(engine, items, Sampling(max_new_tokens=12))) == {"mats": 1.0}
    reply = engine.complete(["where?"], Sampling(max_new_tokens=12))[0]
    assert (reply.text, reply.finish) == ("the mat", "stop")
    assert reply.ended_by == engine.tokenizer.convert_tokens_to_ids(end)


def test_a_reply_that_is_cut_off_is_not_correct(engine: Engine) -> None:
    say(engine, "the mat")
    items = [Item("1", "mats", (Message("user", "where?"),), "the mat")]
    size = len(engine.tokenizer.encode("the mat"))
    (result,) = run_eval(engine, items, Sampling(max_new_tokens=size))
    assert (result.reply, result.matches, result.correct) == ("the mat", True, False)
