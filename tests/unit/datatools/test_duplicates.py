"""MinHash against the true similarity, and what counts as the same text."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import write_jsonl

from minigpt.datatools.duplicates import EXAM_NGRAM, ExamIndex, NearDuplicates, _ngrams, _units
from minigpt.evaluate.exam import normalise


def shingles(text: str) -> set[str]:
    letters = "".join(char for char in text.casefold() if char.isalnum())
    return {letters[i : i + 5] for i in range(len(letters) - 4)}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def near_duplicates(texts: list[str], threshold: float = 0.8) -> set[tuple[int, int]]:
    near = NearDuplicates()
    for start in range(0, len(texts), 7):  # batches must not matter
        part = texts[start : start + 7]
        near.add(part, range(start, start + len(part)))
    return set(near.pairs(threshold))


def test_pairs_have_the_similarity_that_was_asked_for() -> None:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz天地玄黄宇宙洪荒日月盈昃辰宿列张"
    texts = []
    for number in range(150):
        text = [rng.choice(letters) for _ in range(300)]
        texts.append("".join(text))
        for index in rng.sample(range(300), number // 3):
            text[index] = rng.choice(letters)
        texts.append("".join(text))
    pairs = near_duplicates(texts)
    truth = {(i + 1, i): jaccard(texts[i], texts[i + 1]) for i in range(0, len(texts), 2)}
    assert {pair for pair, alike in truth.items() if alike > 0.92} <= pairs
    assert pairs <= {pair for pair, alike in truth.items() if alike > 0.62}
    assert sum(alike > 0.92 for alike in truth.values()) >= 5
    assert sum(alike < 0.62 for alike in truth.values()) >= 50


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Hello, World of text!", "hello world -- OF TEXT", True),
        ("ＨＥＬＬＯ　ＷＯＲＬＤ １２３", "hello world 123", True),
        ("春眠不觉晓，处处闻啼鸟。", "春眠不觉晓 处处闻啼鸟", True),
        ("春眠不觉晓，处处闻啼鸟。", "夜来风雨声，花落知多少。", False),
        ("𠮷野家の牛丼を食べる", "𠮷野家の牛丼を食べる!", True),
        ("абвгдежз", "АБВГДЕЖЗ", True),
        ("abcd", "abcd", False),  # too short to compare
    ],
)
def test_case_width_and_punctuation_do_not_matter(one: str, other: str, same: bool) -> None:
    assert near_duplicates([one, other], 1.0) == ({(1, 0)} if same else set())


def test_nothing_is_like_nothing() -> None:
    assert near_duplicates([]) == set()
    assert near_duplicates(["", "!!", "ab"]) == set()


def test_a_long_chain_of_copies_points_to_the_first() -> None:
    text = " ".join(map(str, np.arange(50)))
    assert near_duplicates([text] * 40, 1.0) == {(i, 0) for i in range(1, 40)}


LONG = (
    "What is the name of the bird that sings in the garden behind the old mill at dawn?",
    "请问住在河边的那位老木匠每天早上给谁送去一把新做的椅子？",
    "Ｗｈｅｎ does the café open, and why is it n o t a s e a r l y a s the bakery?",
)
SHORT = (
    "Où est le café?",
    "The ﬁrst one",
    "你好吗？",
    "각 하나",
    "ガラスとｶﾞﾗｽ",
    "½ of it",
    "１２３ go!",
)


def test_a_sieve_misses_no_leak(tmp_path: Path) -> None:
    """What an index finds is what looking at every text finds."""
    rng, asked = random.Random(1), LONG + SHORT
    rows = [{"messages": [{"role": "user", "content": q}], "answer": "a"} for q in asked]
    write_jsonl(path := tmp_path / "exam.jsonl", rows)
    index, texts = ExamIndex([path]), [""]
    forms: tuple[Callable[[str], str], ...] = (
        *(str, str.upper, str.lower),
        *(partial(unicodedata.normalize, form) for form in ("NFD", "NFKD", "NFKC", "NFC")),
        *(lambda text: f"“{text}”。", lambda text: text.replace(" ", "-")),
    )
    for _ in range(3000):
        text = rng.choice(forms)(rng.choice(asked))
        if rng.random() < 0.6:  # a part, somewhere in another text
            start = rng.randrange(len(text))
            text = text[start : start + rng.randrange(80)]
            text = rng.choice(["", "abc ", "天地，"]) + text + rng.choice(["", " 1", "玄"])
        texts.append(text)

    def runs(text: str) -> set[int]:
        return set(_ngrams(*_units([text]), EXAM_NGRAM)[0].tolist())

    ngrams, equal = set().union(*map(runs, LONG)), set(map(normalise, SHORT))
    leaks = [bool(runs(text) & ngrams) or normalise(text) in equal for text in texts]
    expected = {i for i, leak in enumerate(leaks) if leak}
    assert index.hits(texts).keys() == expected
    assert 500 < len(expected) < 2500
    assert index.hits([]) == index.hits([""]) == {}
