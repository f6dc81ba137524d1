"""MinHash against the true similarity, and what counts as the same text."""

from __future__ import annotations

import random

import numpy as np
import pytest

from minigpt.corpus.duplicates import NearDuplicates


def shingles(text: str) -> set[str]:
    letters = "".join(char for char in text.casefold() if char.isalnum())
    return {letters[i : i + 5] for i in range(len(letters) - 4)}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def found(texts: list[str], threshold: float = 0.8) -> set[tuple[int, int]]:
    near = NearDuplicates()
    for start in range(0, len(texts), 7):  # batches must not matter
        part = texts[start : start + 7]
        near.add(part, range(start, start + len(part)))
    return set(near.pairs(threshold))


def test_pairs_have_the_similarity_that_was_asked_for() -> None:
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz天地玄黄宇宙洪荒日月盈昃辰宿列张"
    texts = []
    for number in range(150):
        text = [chance.choice(letters) for _ in range(300)]
        texts.append("".join(text))
        for place in chance.sample(range(300), number // 3):
            text[place] = chance.choice(letters)
        texts.append("".join(text))
    pairs = found(texts)
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
    assert found([one, other], 1.0) == ({(1, 0)} if same else set())


def test_nothing_is_like_nothing() -> None:
    assert found([]) == set()
    assert found(["", "!!", "ab"]) == set()


def test_a_long_chain_of_copies_points_to_the_first() -> None:
    text = " ".join(map(str, np.arange(50)))
    assert found([text] * 40, 1.0) == {(i, 0) for i in range(1, 40)}
