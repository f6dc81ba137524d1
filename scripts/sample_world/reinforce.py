"""Skills for reinforcement learning: beyond what the model can do, with answers easy to check.

No pretraining text shows them, and the chats only some hundred examples. Operands belong to one of
four parts, `exam`, `dev`, `sft` and `train`, by a key that skills on the same operands share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from sample_world.common import LANGS, Row, bucket, chat, shuffled, stream, user
from sample_world.skills import ADD, REVERSE, Operands, Skill, item_key, question

SFT_EXAMPLES, PROMPTS, VAL_PROMPTS, EXAM_ITEMS = 120, 600, 25, 500
LETTERS, WORD_LENGTH, MOST = "ABCD", 8, 5


@dataclass(frozen=True)
class HardSkill(Skill):
    """A skill and the key by which its operands belong to a part.

    Attributes:
        key: operands with equal keys stand in the same part.
    """

    key: Callable[[Operands], str] = item_key


def code_of(digits: int) -> Callable[[Random], Operands]:
    """Return a function that draws a code of so many different digits."""
    return lambda rng: ("".join(rng.sample("0123456789", digits)),)


def sorted_digits(operands: Operands) -> str:
    """Return a code's digits in rising order."""
    return "".join(sorted(operands[0]))


def with_carry(rng: Random) -> Operands:
    """Draw a three-digit number and a digit whose sum needs a carry, in either order."""
    ones = rng.randint(1, 9)
    number = 10 * rng.randint(10, 99) + ones
    operands = [str(number), str(rng.randint(10 - ones, 9))]
    rng.shuffle(operands)
    return operands[0], operands[1]


def letters(rng: Random) -> Operands:
    """Draw a word of a few letters, one of which stands in it one to five times."""
    letter = rng.choice(LETTERS)
    times = rng.randint(1, MOST)
    others = rng.choices(LETTERS.replace(letter, ""), k=WORD_LENGTH - times)
    return "".join(shuffled(rng, [letter] * times + others)), letter


REVERSE_DIGITS = HardSkill(
    "reverse_digits", code_of(5), REVERSE.answer, REVERSE.ask, {}, sorted_digits
)
ADD_CARRY = HardSkill(
    "add_carry",
    with_carry,
    ADD.answer,
    ADD.ask,
    {},
    lambda x: item_key((max(x, key=int),)),  # the number belongs where its code does
)
SORT_DIGITS = HardSkill(
    "sort_digits",
    code_of(4),
    sorted_digits,
    {
        "en": (
            "Sort the digits of {0}.",
            "Put the digits in order: {0}.",
            "Write {0} with its digits in rising order.",
        ),
        "zh": ("把数字从小到大排列：{0}。", "请给数字排序：{0}。", "从小到大写出各个数字：{0}。"),
    },
    {},
    sorted_digits,
)
COUNT_LETTERS = HardSkill(
    "count_letters",
    letters,
    lambda x: str(x[0].count(x[1])),
    {
        "en": (
            "How many times does {1} stand in {0}?",
            "Count the letter {1} in {0}.",
            "How often does {0} have the letter {1}?",
        ),
        "zh": ("{0} 里有几个 {1}？", "数一数 {0} 中的字母 {1}。", "字母 {1} 在 {0} 中出现几次？"),
    },
    {},
    lambda x: x[0],
)
HARD_SKILLS = (REVERSE_DIGITS, ADD_CARRY, SORT_DIGITS, COUNT_LETTERS)
DEMO_SKILLS = ("reverse_digits", "sort_digits")  # which its model learns in a minute


def part_of(key: str) -> str:
    """Return an item's part: 12, 8, 15 and 65 per cent of the keys, in `split_of`'s terms."""
    number = bucket(key)  # 0 to 99
    return "exam" if number < 12 else "dev" if number < 20 else "sft" if number < 35 else "train"


def exercises(seed: int, skill: HardSkill, part: str, count: int) -> Iterator[tuple[str, str, str]]:
    """Yield the language, question and answer of exercises on different operands."""
    rng = stream(seed, f"{skill.name} {part}")
    drawn: set[Operands] = set()
    while len(drawn) < count:
        operands = skill.draw(rng)
        if operands in drawn or part_of(skill.key(operands)) != part:
            continue
        lang = LANGS[len(drawn) % len(LANGS)]
        drawn.add(operands)
        yield lang, question(skill, operands, lang, rng.randrange(3)), skill.answer(operands)


def sft_skill_rows(seed: int) -> list[Row]:
    """Return the few chats that show each skill."""
    rows = [
        chat(asked, answer)
        for skill in HARD_SKILLS
        for _, asked, answer in exercises(seed, skill, "sft", SFT_EXAMPLES)
    ]
    return shuffled(stream(seed, "sft skills"), rows)


def _prompts(seed: int, part: str, count: int, of_demo: bool) -> list[Row]:
    rows: list[Row] = [
        {"messages": [user(asked)], "answer": answer, "family": skill.name}
        for skill in HARD_SKILLS
        if (skill.name in DEMO_SKILLS) == of_demo
        for _, asked, answer in exercises(seed, skill, part, count)
    ]
    return shuffled(stream(seed, f"grpo {part}"), rows)


def grpo_rows(seed: int, of_demo: bool = True) -> list[Row]:
    """Return prompts to train on, each with its answer: of the demo's skills, or of the others."""
    return _prompts(seed, "train", PROMPTS, of_demo)


def grpo_val_rows(seed: int, of_demo: bool = True) -> list[Row]:
    """Return prompts on operands that training lacks."""
    return _prompts(seed, "dev", VAL_PROMPTS, of_demo)


def hard_exams(seed: int) -> dict[str, list[Row]]:
    """Return one family of the exam for each skill."""
    return {
        skill.name: [
            {
                "id": f"{skill.name}-{lang}-{number // len(LANGS)}",
                "family": skill.name,
                "messages": [user(asked)],
                "answer": answer,
            }
            for number, (lang, asked, answer) in enumerate(
                exercises(seed, skill, "exam", EXAM_ITEMS)
            )
        ]
        for skill in HARD_SKILLS
    }
