"""Small skills with exact answers: numbers and spelled words.

Every item belongs to one of the splits `train`, `dev` and `exam` by its operands alone, so
that no operands of the exam are ever shown in training, in any wording or language.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from sample_world.common import split_of

CONSONANTS = "bdfghklmnprstv"
VOWELS = "aeiou"
UNWANTED = ("dag", "dik", "fag", "fuk", "hor", "kum", "nig", "put", "rap", "vag")


@dataclass(frozen=True)
class Skill:
    """One skill: how to draw operands, how to answer, ask and show it."""

    name: str
    draw: Callable[[Random], tuple[str, ...]]
    answer: Callable[[tuple[str, ...]], str]
    ask: dict[str, tuple[str, ...]]
    show: dict[str, tuple[str, ...]]


def no_carry(rng: Random) -> tuple[str, ...]:
    """Draw two two-digit numbers whose sum needs no carry."""
    tens, ones = rng.randint(1, 8), rng.randint(0, 9)
    other = 10 * rng.randint(1, 9 - tens) + rng.randint(0, 9 - ones)
    return str(10 * tens + ones), str(other)


def two_numbers(rng: Random) -> tuple[str, ...]:
    """Draw two different two-digit numbers with different tens."""
    first, second = rng.sample(range(1, 10), 2)
    return str(10 * first + rng.randint(0, 9)), str(10 * second + rng.randint(0, 9))


def one_number(rng: Random) -> tuple[str, ...]:
    """Draw a three-digit number whose last digit is no nine."""
    return (str(10 * rng.randint(10, 99) + rng.randint(0, 8)),)


def invented_word(rng: Random, length: int) -> str:
    """Make up a pronounceable word with no letter used twice."""
    while True:
        letters = [rng.choice(VOWELS if i % 2 else CONSONANTS) for i in range(length)]
        word = "".join(letters)
        if len(set(letters)) == length and not any(part in word for part in UNWANTED):
            return word


def spelled_word(rng: Random) -> tuple[str, ...]:
    """Draw a made-up word of four letters, spelled with hyphens."""
    return ("-".join(invented_word(rng, 4)),)


def two_words(rng: Random) -> tuple[str, ...]:
    """Draw two made-up words of four letters, spelled with hyphens."""
    return ("-".join(invented_word(rng, 4)), "-".join(invented_word(rng, 4)))


SKILLS = (
    Skill(
        "add",
        no_carry,
        lambda x: str(int(x[0]) + int(x[1])),
        {
            "en": ("What is {0} + {1}?", "What is {0} plus {1}?", "Add {0} and {1}."),
            "zh": ("{0} + {1} 等于多少？", "{0} 加 {1} 是多少？", "请算一算：{0} + {1}。"),
        },
        {
            "en": (
                "{0} + {1} = {a}",
                "{0} plus {1} is {a}.",
                "If you add {0} and {1}, you get {a}.",
                "The sum of {0} and {1}:\n{a}",
            ),
            "zh": (
                "{0} + {1} = {a}",
                "{0} 加 {1} 是 {a}。",
                "把 {0} 和 {1} 相加，得到 {a}。",
                "{0} 与 {1} 的和：\n{a}",
            ),
        },
    ),
    Skill(
        "larger",
        two_numbers,
        lambda x: max(x, key=int),
        {
            "en": (
                "Which is larger, {0} or {1}?",
                "Name the larger number: {0} or {1}.",
                "Is {0} or {1} more?",
            ),
            "zh": ("{0} 和 {1} 哪个大？", "请说出较大的数：{0} 还是 {1}？", "{0} 和 {1}，谁更大？"),
        },
        {
            "en": (
                "Of {0} and {1}, the larger is {a}.",
                "The larger of {0} and {1} is {a}.",
                "The larger of {0} and {1}:\n{a}",
            ),
            "zh": (
                "{0} 和 {1} 里较大的是 {a}。",
                "{0} 与 {1} 相比，大的是 {a}。",
                "{0} 和 {1} 里较大的：\n{a}",
            ),
        },
    ),
    Skill(
        "next",
        one_number,
        lambda x: str(int(x[0]) + 1),
        {
            "en": (
                "What number comes after {0}?",
                "Count on by one from {0}.",
                "Which number follows {0}?",
            ),
            "zh": ("{0} 的下一个数是多少？", "从 {0} 往后数一个数是几？", "{0} 后面是哪个数？"),
        },
        {
            "en": (
                "After {0} comes {a}.",
                "The number after {0} is {a}.",
                "The number after {0}:\n{a}",
            ),
            "zh": ("{0} 的下一个数是 {a}。", "{0} 后面是 {a}。", "{0} 的下一个数：\n{a}"),
        },
    ),
    Skill(
        "first_letter",
        spelled_word,
        lambda x: x[0][0],
        {
            "en": (
                "What is the first letter of {0}?",
                "With which letter does {0} begin?",
                "Give the first letter of {0}.",
            ),
            "zh": ("{0} 的第一个字母是什么？", "{0} 以哪个字母开头？", "请写出 {0} 的首字母。"),
        },
        {
            "en": (
                "The first letter of {0} is {a}.",
                "The word {0} begins with {a}.",
                "The first letter of {0}:\n{a}",
            ),
            "zh": ("{0} 的第一个字母是 {a}。", "{0} 的开头是 {a}。", "{0} 的第一个字母：\n{a}"),
        },
    ),
    Skill(
        "last_letter",
        spelled_word,
        lambda x: x[0][-1],
        {
            "en": (
                "What is the last letter of {0}?",
                "With which letter does {0} end?",
                "Give the last letter of {0}.",
            ),
            "zh": ("{0} 的最后一个字母是什么？", "{0} 以哪个字母结尾？", "请写出 {0} 的尾字母。"),
        },
        {
            "en": (
                "The last letter of {0} is {a}.",
                "The word {0} ends with {a}.",
                "The last letter of {0}:\n{a}",
            ),
            "zh": ("{0} 的最后一个字母是 {a}。", "{0} 的结尾是 {a}。", "{0} 的最后一个字母：\n{a}"),
        },
    ),
    Skill(
        "reverse",
        spelled_word,
        lambda x: x[0][::-1],
        {
            "en": ("Spell {0} backwards.", "What is {0} backwards?", "Turn {0} around."),
            "zh": ("把 {0} 倒过来拼。", "{0} 倒着写是什么？", "请把 {0} 反过来。"),
        },
        {
            "en": (
                "Spelled backwards, {0} is {a}.",
                "Turn {0} around and you get {a}.",
                "{0} backwards:\n{a}",
            ),
            "zh": ("{0} 倒过来是 {a}。", "把 {0} 反过来就是 {a}。", "{0} 倒过来：\n{a}"),
        },
    ),
    Skill(
        "repeat",
        two_words,
        lambda x: f"{x[0]} {x[1]}",
        {
            "en": (
                "Repeat after me: {0} {1}",
                "Say this again: {0} {1}",
                "Copy these words: {0} {1}",
            ),
            "zh": ("请跟我说：{0} {1}", "请重复一遍：{0} {1}", "照着抄写：{0} {1}"),
        },
        {
            "en": (
                "She said {0} {1} and the echo said {a}.",
                "Copy {0} {1} and you have {a}.",
                "The echo of {0} {1}:\n{a}",
            ),
            "zh": (
                "他说 {0} {1}，回声也说 {a}。",
                "照着 {0} {1} 抄写，就是 {a}。",
                "{0} {1} 的回声：\n{a}",
            ),
        },
    ),
)


def item_keys(operands: tuple[str, ...]) -> list[str]:
    """Return what decides an item's split: each word, or the numbers in rising order.

    The skills share these keys: a word or a pair of numbers that the exam uses for one
    skill is in training for none.
    """
    return [",".join(sorted(operands))] if operands[0].isdigit() else list(operands)


def draw_item(rng: Random, skill: Skill, split: str) -> tuple[str, ...]:
    """Draw operands that belong to one split."""
    while True:
        operands = skill.draw(rng)
        if all(split_of(key) == split for key in item_keys(operands)):
            return operands


def question(skill: Skill, operands: tuple[str, ...], lang: str, wording: int) -> str:
    """Ask about operands in one wording."""
    return skill.ask[lang][wording % len(skill.ask[lang])].format(*operands)


def example(rng: Random, skill: Skill, lang: str) -> str:
    """Return one worked example for the pretraining text."""
    operands = draw_item(rng, skill, "train")
    return rng.choice(skill.show[lang]).format(*operands, a=skill.answer(operands))
