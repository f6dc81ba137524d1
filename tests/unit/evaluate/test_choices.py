"""Multiple choice and minimal pairs, against the model's own plain forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from tiny_runs import write_jsonl

from minigpt.data.tokenizer import load
from minigpt.evaluate.choices import choose
from minigpt.evaluate.exam import load_items
from minigpt.evaluate.scores import share
from minigpt.infer.engine import Engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(
        tiny.model("qwen3"), load(tiny.tokenizer(tmp_path_factory.mktemp("choices") / "t"))
    )


def logp(model: Engine, context: list[int], targets: list[int]) -> float:
    """Score one continuation with nothing but the model's forward."""
    with torch.no_grad():
        logits = model.model(torch.tensor([context + targets])).logits[0, len(context) - 1 : -1]
    labels = torch.tensor(targets)[:, None]
    return float(logits.float().log_softmax(-1).gather(1, labels).sum())


CHOICES: list[dict[str, object]] = [
    {"prompt": "the cat", "choices": [" sat", " dog on the"], "answer": 1, "family": "a"},
    {"prompt": "the dog", "choices": [" sat", " log", " cat"], "answer": " cat", "family": "b"},
    {"messages": [{"role": "user", "content": "the"}], "choices": ["cat", "mat"], "answer": 0},
]


def test_multiple_choice_by_byte_and_by_sum(model: Engine, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    write_jsonl(file, CHOICES)
    items = load_items(file, "choices")
    assert [(i.family, i.answer) for i in items] == [
        ("a", " dog on the"),
        ("b", " cat"),
        ("c", "cat"),
    ]
    per_byte, by_sum = [], []
    for item in items:
        start = model.encode(item.prompt)
        sums = [logp(model, start, model.encode(c)) for c in item.choices]
        means = [x / len(c.encode()) for x, c in zip(sums, item.choices, strict=True)]
        by_sum.append(item.choices[sums.index(max(sums))] == item.answer)
        per_byte.append(item.choices[means.index(max(means))] == item.answer)
    scores = choose(model, items, str(file))
    expected_by_chance = (1 / 2 + 1 / 3 + 1 / 2) / 3
    assert scores["accuracy"] == share(per_byte, pytest.approx(expected_by_chance))
    assert scores["accuracy (sum)"] == share(by_sum, pytest.approx(expected_by_chance))
    assert scores["b"] == share(per_byte[1:2], pytest.approx(1 / 3))
    assert list(scores) == ["accuracy", "accuracy (sum)", "a", "b", "c"]


def test_minimal_pairs_are_judged_by_the_whole_text(model: Engine, tmp_path: Path) -> None:
    rows = [
        ("the cat sat on the mat", "the cat mat on the sat"),  # alike up to a token
        ("cat the sat", "the cat sat"),  # different from the first token on
        ("the cat", "the cat sat"),  # the start of the other
    ]
    file = tmp_path / "p.jsonl"
    write_jsonl(file, [{"good": good, "bad": bad} for good, bad in rows])
    expected = []
    for good, bad in rows:
        texts = [model.encode(good), model.encode(bad)]
        start = [] if texts[0][0] == texts[1][0] else model.encode("")
        first, second = (logp(model, (start + t)[:1], (start + t)[1:]) for t in texts)
        expected.append(first > second)
    assert choose(model, load_items(file, "pairs"), str(file)) == {"accuracy": share(expected, 0.5)}
