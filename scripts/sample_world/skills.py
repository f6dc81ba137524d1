"""Small skills with exact answers, on numbers and on codes of three digits.

Every item belongs to one of the splits `train`, `dev` and `exam` by its operands alone, so
that no operands of the exam are ever shown in training, in any wording or language.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from sample_world.common import in_prose, split_of

Operands = tuple[str, ...]


@dataclass(frozen=True)
class Skill:
    """One skill: how to draw operands and how to answer, ask and show it.

    Attributes:
        ask: questions in the chats and in the exam.
        show: worked examples in the pretraining text; `{a}` is the answer.
    """

    name: str
    draw: Callable[[Random], Operands]
    answer: Callable[[Operands], str]
    ask: dict[str, tuple[str, ...]]
    show: dict[str, tuple[str, ...]]


def no_carry(rng: Random) -> Operands:
    """Draw a two-digit number and a digit whose sum needs no carry."""
    ones = rng.randint(0, 8)
    return str(10 * rng.randint(1, 9) + ones), str(rng.randint(1, 9 - ones))


def two_numbers(rng: Random) -> Operands:
    """Draw two two-digit numbers with different tens."""
    first, second = rng.sample(range(1, 10), 2)
    return str(10 * first + rng.randint(0, 9)), str(10 * second + rng.randint(0, 9))


def one_code(rng: Random) -> Operands:
    """Draw a code of three different digits."""
    return ("".join(rng.sample("0123456789", 3)),)


ADD = Skill(
    "add",
    no_carry,
    lambda x: str(int(x[0]) + int(x[1])),
    {
        "en": ("What is {0} + {1}?", "Please work out {0} + {1}.", "How much is {0} + {1}?"),
        "zh": ("请计算：{0} + {1}。", "算一算：{0} + {1}。", "结果是多少：{0} + {1}？"),
    },
    {
        "en": ("{0} + {1} = {a}", "Add {0} + {1}:\n{a}"),
        "zh": ("{0} + {1} = {a}", "相加，{0} + {1}：\n{a}"),
    },
)
LARGER = Skill(
    "larger",
    two_numbers,
    lambda x: max(x, key=int),
    {
        "en": (
            "Which is larger, {0} or {1}?",
            "Name the larger number: {0} or {1}?",
            "Tell me which is more, {0} or {1}?",
        ),
        "zh": (
            "哪个更大：{0} 和 {1}？",
            "请说出较大的数：{0} 和 {1}。",
            "比一比大小：{0} 和 {1}。",
        ),
    },
    {
        "en": ("The larger of {0} and {1} is {a}.", "Larger, {0} or {1}:\n{a}"),
        "zh": ("较大的数，{0} 和 {1}：{a}", "更大的是，{0} 和 {1}：\n{a}"),
    },
)
FIRST = Skill(
    "first_digit",
    one_code,
    lambda x: x[0][0],
    {
        "en": (
            "What is the first digit of {0}?",
            "With which digit begins {0}?",
            "Give me the first digit of {0}.",
        ),
        "zh": ("第一个数字是什么：{0}？", "开头的数字是哪个：{0}？", "请写出第一个数字：{0}。"),
    },
    {
        "en": ("The first digit of {0} is {a}.", "First digit of {0}:\n{a}"),
        "zh": ("第一个数字，{0}：{a}", "开头的数字，{0}：\n{a}"),
    },
)
LAST = Skill(
    "last_digit",
    one_code,
    lambda x: x[0][-1],
    {
        "en": (
            "What is the last digit of {0}?",
            "With which digit ends {0}?",
            "Give me the last digit of {0}.",
        ),
        "zh": ("最后一个数字是什么：{0}？", "结尾的数字是哪个：{0}？", "请写出最后一个数字：{0}。"),
    },
    {
        "en": ("The last digit of {0} is {a}.", "Last digit of {0}:\n{a}"),
        "zh": ("最后一个数字，{0}：{a}", "结尾的数字，{0}：\n{a}"),
    },
)
REVERSE = Skill(
    "reverse",
    one_code,
    lambda x: x[0][::-1],
    {
        "en": (
            "Write backwards: {0}.",
            "Turn the code around: {0}.",
            "Please reverse the code {0}.",
        ),
        "zh": ("请倒着写：{0}。", "把密码反过来：{0}。", "倒过来是什么：{0}？"),
    },
    {
        "en": ("Backwards, {0} is {a}.", "Reverse of {0}:\n{a}"),
        "zh": ("倒过来，{0}：{a}", "反过来写，{0}：\n{a}"),
    },
)
REPEAT = Skill(
    "repeat",
    one_code,
    lambda x: x[0],
    {
        "en": ("Repeat the code {0}.", "Say this again: {0}.", "Please copy the code {0}."),
        "zh": ("请重复一遍：{0}。", "照着抄写：{0}。", "把密码再说一遍：{0}。"),
    },
    {
        "en": ("The copy of {0} is {a}.", "Repeat {0}:\n{a}"),
        "zh": ("重复，{0}：{a}", "再说一遍，{0}：\n{a}"),
    },
)
SKILLS = (ADD, LARGER, FIRST, LAST, REVERSE, REPEAT)
# The harder skills come more often.
WEIGHTED = (ADD, ADD, LARGER, LARGER, FIRST, LAST, REVERSE, REPEAT)


def item_key(operands: Operands) -> str:
    """Return what decides an item's split, the same for every skill.

    That is a code in either direction, or two numbers in rising order.
    """
    if len(operands) > 1:
        return ",".join(sorted(operands, key=int))
    (code,) = operands
    return min(code, code[::-1])


def draw_item(rng: Random, skill: Skill, split: str) -> Operands:
    """Draw operands that belong to one split."""
    while True:
        operands = skill.draw(rng)
        if split_of(item_key(operands)) == split:
            return operands


def question(skill: Skill, operands: Operands, lang: str, wording: int) -> str:
    """Ask about operands in one wording."""
    return skill.ask[lang][wording % len(skill.ask[lang])].format(*operands)


def example(rng: Random, skill: Skill, lang: str) -> str:
    """Return one worked example for the pretraining text, plain or as a question."""
    operands = draw_item(rng, skill, "train")
    answer = skill.answer(operands)
    if rng.random() < 0.5:
        return rng.choice(skill.show[lang]).format(*operands, a=answer)
    return in_prose(rng, question(skill, operands, lang, rng.randrange(3)), answer, lang)


def _join(words: list[str], lang: str) -> str:
    return (", " if lang == "en" else "，").join(words)


def _sums(rng: Random, lang: str) -> str:
    """Add one digit to several numbers with the same last digit."""
    first, second = draw_item(rng, ADD, "train")
    numbers = range(10 + int(first) % 10, 100, 10)
    training = [n for n in numbers if split_of(item_key((str(n), second))) == "train"]
    drawn = rng.sample(training, min(4, len(training)))
    return _join([f"{n} + {second} = {n + int(second)}" for n in drawn], lang)


def _table(rng: Random, lang: str) -> str:
    """Write a short table of codes that are repeated or turned around."""
    skill, title = rng.choice(
        ((REVERSE, {"en": "Backwards", "zh": "倒过来"}), (REPEAT, {"en": "Copies", "zh": "重复"}))
    )
    codes = [draw_item(rng, skill, "train") for _ in range(5)]
    lines = [f"{code[0]}: {skill.answer(code)}" for code in codes]
    return "\n".join([title[lang], *lines])


def drill(rng: Random, lang: str) -> str:
    """Return lines that practise one skill several times over."""
    kind = rng.choice((_sums, _table, _table))
    return kind(rng, lang)
