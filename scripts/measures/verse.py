"""Lines and rhymes of classical Chinese poems.

`rhymes.txt` has a group of finals in each line: the rhymes of the 平水韻 tables, in the wider
groups that 詞林正韻 lets rhyme, with level and other tones apart. 2,300 characters were
written down by rhyme; 2,500 more are in the group of those that they rhyme with in the training
poems of docs/results.md (three times or more, and three times in four); then come simplified forms
(by OpenCC). A character may stand in several groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MARKS = re.compile(r"[^\u3400-\u9fff\U00020000-\U0003ffff]+")  # all that is no Chinese character
LENGTHS = (5, 7)  # characters of a line of regular verse
LEAST_LINES = 4


@dataclass(frozen=True)
class Verse:
    """What was counted in some poems.

    Attributes:
        poems: how many there are.
        regular: how many have an even number of lines, four or more, all of five characters or
            all of seven.
        judged: of these, how many have second and fourth lines that end in characters of the table.
        rhymed: of the judged ones, in how many these rhyme.
    """

    poems: int
    regular: int
    judged: int
    rhymed: int

    def shares(self) -> dict[str, float]:
        """Return regular poems among all, and rhymed ones among the judged and among all."""
        return {
            "regular": self.regular / max(1, self.poems),
            "rhymed of regular": self.rhymed / max(1, self.judged),
            "regular and rhymed": self.rhymed / max(1, self.poems),
            "judged of regular": self.judged / max(1, self.regular),
        }


@cache
def groups() -> dict[str, frozenset[str]]:
    """Return the names of the groups of each character."""
    table: dict[str, frozenset[str]] = {}
    text = Path(__file__).with_name("rhymes.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        name, characters = line.split()
        for character in characters:
            table[character] = table.get(character, frozenset()) | {name}
    return table


def lines(poem: str) -> list[str]:
    """Cut a poem, without title and author, into lines: what stands between marks."""
    return [line for line in MARKS.split(poem) if line]


def is_regular(poem: Sequence[str]) -> bool:
    """Whether lines are regular verse."""
    lengths = {len(line) for line in poem}
    even = len(poem) >= LEAST_LINES and len(poem) % 2 == 0
    return even and len(lengths) == 1 and lengths <= set(LENGTHS)


def rhyme(one: str, other: str) -> bool | None:
    """Whether two lines rhyme; None where the table lacks one of the ends."""
    first, second = groups().get(one[-1:]), groups().get(other[-1:])
    return None if first is None or second is None else bool(first & second)


def measure(poems: Sequence[str]) -> Verse:
    """Count regular poems, and those whose second and fourth lines rhyme."""
    regular = [poem for poem in map(lines, poems) if is_regular(poem)]
    verdicts = [rhyme(poem[1], poem[3]) for poem in regular]
    judged = [verdict for verdict in verdicts if verdict is not None]
    return Verse(len(poems), len(regular), len(judged), sum(judged))
