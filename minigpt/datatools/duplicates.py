"""Rows that nearly repeat each other, or an exam: found with arrays instead of loops.

Text is folded (case, width) and cut into units: a Chinese or Japanese character is one, a
word or number of other scripts is one. n-grams of units are hashed in 64 bits.

Arrays (C characters, U units, S texts):
    codes [C] uint32, units [U] uint64, owner [U] int64 the text that each unit belongs to
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minigpt.evaluate.exam import fold, load_items, normalise

Hashes = NDArray[np.uint64]
Owners = NDArray[np.int64]

EXAM_NGRAM = 13  # units that count as leaked (Brown et al. 2020)
SHINGLE = 5  # characters
BANDS, ROWS = 16, 4  # of a MinHash signature (Broder 1997): 99.98% of pairs above 0.8 are found
_PAIRS_AT_A_TIME = 1 << 14
# A shared n-gram has at least 4 windows of 10 letters: looking at every 4th start finds one.
_WINDOW = 10  # letters
_STRIDE = EXAM_NGRAM - _WINDOW + 1
# Constants of SplitMix64 (Steele et al. 2014).
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SINGLE, _WORD = 1, 2  # kinds of characters: a unit alone, or a part of one; 0 is neither
_SINGLES = ((0x3040, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00))


@cache
def unicode_tables() -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """Return for each code point what it folds to, and its kind."""
    folded = np.arange(0x110000, dtype=np.uint32)
    kinds = np.zeros(0x110000, np.uint8)
    for code in range(0xD800):
        plain = fold(chr(code)) if code < 0x3400 else chr(code)
        folded[code] = ord(plain) if len(plain) == 1 else code
        kinds[code] = _WORD if chr(code).isalnum() else 0
    for code in range(0xFF00, 0xFFF0):  # full and half width
        folded[code] = ord(fold(chr(code))[:1] or chr(code))
    for start, end in (*_SINGLES, (0x20000, 0x33480)):
        kinds[start:end] = _SINGLE
    return folded, kinds


@cache
def _folds_fully() -> NDArray[np.bool_]:
    """Return for each code point whether all letters of what it folds to are in the table.

    Not so are ligatures, accents that join the letter before them, and what is seldom used.
    """
    fully = np.zeros(0x110000, np.bool_)
    fully[0x3400:0xA000] = fully[0xAC00:0xD7A4] = True
    for code in (*range(0x3400), *range(0xFF00, 0xFFF0)):
        folded = fold(chr(code))
        joins = 0x1100 <= code < 0x1200 or any(unicodedata.category(c)[0] == "M" for c in folded)
        fully[code] = not joins and (len(folded) == 1 or not any(map(str.isalnum, folded)))
    return fully


def _codes(texts: Sequence[str]) -> NDArray[np.uint32]:
    return np.frombuffer("".join(texts).encode("utf-32-le"), "<u4")


def characters(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.uint8], Owners]:
    """Return the folded characters [C] of all texts, their kinds [C] and owners [C]."""
    folded, kinds = unicode_tables()
    codes = folded[_codes(texts)]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return codes, kinds[codes], np.repeat(np.arange(len(texts)), lengths)


def _mixed(values: Hashes) -> Hashes:
    """Return hashes with mixed bits, by the first round of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * _MIX
    mixed: Hashes = values ^ (values >> np.uint64(27))
    return mixed


def _units(texts: Sequence[str]) -> tuple[Hashes, Owners]:
    """Return the hashes [U] of all texts' units and their owners [U]."""
    codes, kinds, owner = characters(texts)
    inside = (kinds[1:] == _WORD) & (kinds[:-1] == _WORD) & (owner[1:] == owner[:-1])
    starts = np.flatnonzero((kinds > 0) & ~np.concatenate([[False], inside]))
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    lengths = np.diff(np.append(starts, len(codes)))
    offset = np.arange(starts[0], len(codes)) - np.repeat(starts, lengths)
    powers = np.multiply.accumulate(np.full(64, _BASE, np.uint64))
    hashes = _mixed(codes[starts[0] :].astype(np.uint64) * _BASE) * powers[np.minimum(offset, 63)]
    hashes[kinds[starts[0] :] == 0] = 0
    return np.add.reduceat(hashes, starts - starts[0]), owner[starts]


def _ngrams(units: Hashes, owner: Owners, n: int) -> tuple[Hashes, Owners]:
    """Return the hashes of all n-grams of units inside one text, and their owners."""
    count = max(0, len(units) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(n):
        hashes = hashes * _BASE + units[i : i + count]
    inside = owner[:count] == owner[n - 1 :][:count]
    return _mixed(hashes[inside]), owner[:count][inside]


@cache
def _letters_only() -> NDArray[np.uint32]:
    """Return for each code point what it folds to if that is a letter or a digit; else 0."""
    folded, kinds = unicode_tables()
    letters: NDArray[np.uint32] = folded * (kinds[folded] > 0)
    return letters


def _letter_hashes(letters: NDArray[np.uint32], stride: int) -> NDArray[np.uint32]:
    """Return hashes, of 20 bits, of the windows of 10 letters that begin at every `stride`-th."""
    count = max(0, (len(letters) - _WINDOW) // stride + 1)
    hashes = np.zeros(count, np.uint32)
    for i in range(_WINDOW):
        hashes = hashes * np.uint32(0x9E3779B1) + letters[i:][: count * stride : stride][:count]
    return hashes >> np.uint32(12)


def _bags(letters: NDArray[np.uint32], starts: Owners) -> NDArray[np.uint32]:
    """Return hashes, of 20 bits, of the letters of each text, in any order."""
    hashes = letters * np.uint32(0x9E3779B1)
    bags: NDArray[np.uint32] = np.add.reduceat(hashes * hashes, starts, dtype=np.uint32)
    return bags >> np.uint32(12)


def _owners(starts: Owners, positions: NDArray[np.int64]) -> Owners:
    """Return which texts, by where they start, hold these positions of all texts' characters."""
    return np.unique(np.searchsorted(starts, positions, "right") - 1)


class ExamIndex:
    """The questions of exams, to be looked up in training data.

    A question leaks when a text shares 13 units in a row with it; a question of fewer units,
    when a message or text equals it.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        questions: list[str] = []
        names: list[str] = []
        for path in paths:
            for item in load_items(path, "exam"):
                asked = [m.content for m in item.messages if m.role != "system"]
                questions += asked
                names += [f"{path} ({item.id})"] * len(asked)
        ngrams, owner = _ngrams(*_units(questions), EXAM_NGRAM)
        self.ngrams, first = np.unique(ngrams, return_index=True)
        self.names = [names[i] for i in owner[first]]
        # Whether a hash is that of a window of a long question, or of a short one's bag of letters.
        self.windows, self.bags = np.zeros((2, 1 << 20), np.bool_)
        for i in set(owner.tolist()):
            letters = _letters_only()[_codes(questions[i : i + 1])]
            self.windows[_letter_hashes(letters[letters > 0], 1)] = True
        short = sorted(set(range(len(questions))) - set(owner.tolist()))
        self.short = {normalise(questions[i]): names[i] for i in short}
        for text in filter(None, self.short):
            self.bags[_bags(_letters_only()[_codes([text])], np.zeros(1, np.int64))] = True
        self.longest = max(map(len, self.short), default=0)

    def hits(self, texts: Sequence[str]) -> dict[int, str]:
        """Return the leaked item for each of the texts that leaks one."""
        leaked = {}
        codes = _codes([*texts, "\0"])  # so each text, even an empty one, starts at a character
        starts = np.cumsum([0, *map(len, texts)])
        letters = _letters_only()[codes]
        likely = self._may_share(letters, starts) if len(self.ngrams) else []
        ngrams, owner = _ngrams(*_units([texts[i] for i in likely]), EXAM_NGRAM)
        nearest = np.minimum(np.searchsorted(self.ngrams, ngrams), len(self.ngrams) - 1)
        for i in np.flatnonzero(self.ngrams[nearest] == ngrams).tolist():
            leaked[likely[owner[i]]] = self.names[nearest[i]]
        for i in self._may_equal(codes, letters, starts) if self.short else ():
            if name := self.short.get(normalise(texts[i])):
                leaked[i] = name
        return leaked

    def _may_share(self, letters: NDArray[np.uint32], starts: Owners) -> list[int]:
        """Return the texts that may share an n-gram with a question."""
        positions = np.flatnonzero(letters)
        hashes = _letter_hashes(letters[positions], _STRIDE)
        matches = np.flatnonzero(self.windows[hashes]) * _STRIDE
        likely: list[int] = _owners(starts, positions[matches]).tolist()
        return likely

    def _may_equal(
        self, codes: NDArray[np.uint32], letters: NDArray[np.uint32], starts: Owners
    ) -> list[int]:
        """Return the texts that may equal a question; to normalise them all takes long."""
        likely = self.bags[_bags(letters, starts)]
        likely[_owners(starts, np.flatnonzero(~_folds_fully()[codes]))] = True
        likely[:-1] &= np.diff(starts) <= self.longest + 8  # with outer spaces and marks
        return np.flatnonzero(likely[:-1]).tolist()


class NearDuplicates:
    """MinHash signatures of texts, and the pairs that are alike.

    Memory: 256 bytes for the signature of each text, and as much again for a moment at the end.
    """

    def __init__(self) -> None:
        random = np.random.default_rng(1)
        self.factors = random.integers(1 << 63, size=(2, BANDS * ROWS), dtype=np.uint64) | 1
        self.signatures: list[NDArray[np.uint32]] = []
        self.numbers: list[NDArray[np.int64]] = []

    def add(self, texts: Sequence[str], numbers: Sequence[int]) -> None:
        """Add texts with their numbers; those of fewer than 5 characters are left out."""
        codes, kinds, owner = characters(texts)
        ngrams, owner = _ngrams(codes[kinds > 0].astype(np.uint64), owner[kinds > 0], SHINGLE)
        if not len(ngrams):
            return
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        signature = np.empty((len(starts), BANDS * ROWS), np.uint32)
        for i, (factor, shift) in enumerate(self.factors.T):
            hashed = ((ngrams * factor + shift) >> np.uint64(32)).astype(np.uint32)
            signature[:, i] = np.minimum.reduceat(hashed, starts)
        self.signatures.append(signature)
        self.numbers.append(np.asarray(numbers, np.int64)[owner[starts]])

    def pairs(self, threshold: float) -> Iterator[tuple[int, int]]:
        """Yield each text that is like an earlier one, by numbers: (text, the earlier one).

        Alike are texts whose estimated Jaccard similarity of 5-character shingles is at
        least `threshold`; the estimate's standard error is 0.05 at 0.8.
        """
        if not self.signatures:
            return
        table, numbers = np.concatenate(self.signatures), np.concatenate(self.numbers)
        self.signatures.clear()
        earlier = np.arange(len(table))
        for band in range(BANDS):
            keys = np.zeros(len(table), np.uint64)
            for column in table[:, band * ROWS : (band + 1) * ROWS].T:
                keys = keys * _BASE + column
            order = np.argsort(keys, kind="stable")
            new = np.append(True, keys[order][1:] != keys[order][:-1])
            alike = np.flatnonzero(~new)
            starts = np.flatnonzero(new)
            for block in np.array_split(alike, len(alike) // _PAIRS_AT_A_TIME + 1):
                firsts = starts[np.searchsorted(starts, block, "right") - 1]
                for other in (order[block - 1], order[firsts]):
                    row = order[block]
                    same = (table[row] == table[other]).mean(1) >= threshold
                    np.minimum.at(earlier, row[same], other[same])
        for i in np.flatnonzero(earlier < np.arange(len(table))).tolist():
            yield int(numbers[i]), int(numbers[earlier[i]])
