from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minigpt.data.exam import Item, is_right, load_exam, normalise
from minigpt.data.formats import Message
from minigpt.errors import DataError

ASKED = [{"role": "user", "content": "q"}]
MESSAGES = (Message("user", "q"),)


def item(answer: str, choices: tuple[str, ...] = (), avoid: tuple[str, ...] = ()) -> Item:
    return Item("1", "f", MESSAGES, answer, choices, avoid)


EXACT = item("Paris.")
CHOICE = item("Red", choices=("red", "blue", "Green"))
WITHIN = item("woman", choices=("man", "woman"))
STYLE = item("same time", avoid=("Long story", "!"))


@pytest.mark.parametrize(
    ("judged", "reply", "right"),
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
def test_is_right(judged: Item, reply: str, right: bool) -> None:
    assert is_right(reply, judged) is right


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ""), (" ...\n", ""), ("A, b!", "a, b"), ("“Straße”", "strasse"), ("①？", "1")],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_load_exam(write: Any) -> None:
    rows = [
        {"id": 7, "family": "f", "messages": ASKED, "answer": "a", "choices": ["a", "b"]},
        {"instruction": "q", "answer": "a", "avoid": ["x"], "choices": None},
    ]
    assert load_exam(write(rows, "colours.jsonl")) == [
        Item("7", "f", MESSAGES, "a", ("a", "b"), ()),
        Item("2", "colours", MESSAGES, "a", (), ("x",)),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": "a"}, "not a prompt row"),
        ({"messages": [], "answer": "a"}, "holds no messages"),
        ({"messages": ASKED}, "needs messages and an answer"),
        ({"messages": ASKED, "answer": 3}, "needs messages and an answer"),
        ({"prompt": "q", "answer": "a"}, "needs messages and an answer"),
        (
            {"messages": ASKED, "answer": "z", "choices": ["a", "b"]},
            "answer: is 'z', which is not among the choices",
        ),
        ({"messages": ASKED, "answer": "a", "choices": "ab"}, "choices: must be a list of strings"),
        ({"messages": ASKED, "answer": "a", "choices": ["a", 1]}, "choices: must be a list"),
        ({"messages": ASKED, "answer": "a", "avoid": ["x", " "]}, "avoid: must be a list"),
        (["q", "a"], "a JSON object"),
        ("q", "a JSON object"),
    ],
)
def test_a_bad_item_is_named(write: Any, row: object, problem: str) -> None:
    path = write([{"messages": ASKED, "answer": "a"}, row])
    with pytest.raises(DataError, match=problem) as caught:
        load_exam(path)
    assert (caught.value.path, caught.value.line) == (path, 2)


def test_a_missing_exam_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_exam(tmp_path / "none.jsonl")
