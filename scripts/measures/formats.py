"""Instructions about the form of a reply, each with a checker, and preference pairs by them.

The questions and the wordings of the test are none of those that pairs are made from.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FENCE = re.compile(r"^```(?:json)?\n(.*)\n```$", re.DOTALL)
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
LONGEST_REPLY = 64  # tokens of a reply that is rewarded
WORD = re.compile(r"[\w'-]+")


def is_json(reply: str) -> bool:
    """Whether a reply is a JSON object, in a code fence or not, and nothing else."""
    match = FENCE.match(reply.strip())
    try:
        return isinstance(json.loads(match.group(1) if match else reply), dict)
    except ValueError:
        return False


def has_lines(reply: str, count: int) -> bool:
    """Whether a reply has so many lines, not counting empty ones."""
    return len([line for line in reply.splitlines() if line.strip()]) == count


def is_list(reply: str, count: int) -> bool:
    """Whether each line of a reply is an item that begins with a hyphen, and how many there are."""
    return has_lines(reply, count) and all(
        line.strip().startswith("- ") for line in reply.splitlines() if line.strip()
    )


def is_one_word(reply: str) -> bool:
    """Whether a reply is a single word."""
    return len(WORD.findall(reply)) == 1


def is_one_sentence(reply: str) -> bool:
    """Whether a reply has one sentence, on one line, with its end."""
    text = reply.strip()
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return ends == [len(text)] and has_lines(text, 1)


def is_upper(reply: str) -> bool:
    """Whether all letters are capitals."""
    return reply.isupper()


def begins_with(reply: str, word: str) -> bool:
    """Whether a reply begins with a word, and goes on."""
    return reply.startswith(word) and len(reply.strip()) > len(word)


def ends_with(reply: str, word: str) -> bool:
    """Whether a reply ends in a word, with something before it."""
    return reply.rstrip().endswith(word) and len(reply.strip()) > len(word)


@dataclass(frozen=True)
class Form:
    """A form that a reply must have.

    Attributes:
        check: whether a reply has it.
        wordings: instructions that pairs are made from.
        test: the instruction of the test.
    """

    check: Callable[[str], bool]
    wordings: tuple[str, ...]
    test: str


FORMS = {
    "JSON": Form(
        is_json,
        ('Answer as a JSON object with the key "answer".', "Write your answer as JSON."),
        "Reply in JSON.",
    ),
    "three lines": Form(
        lambda reply: has_lines(reply, 3),
        ("Write exactly three lines.", "Use three lines, no more and no fewer."),
        "Reply in three lines.",
    ),
    "list of three": Form(
        lambda reply: is_list(reply, 3),
        ('Give three items, each on a line that begins with "- ".', 'List three with "- ".'),
        'Reply with a list of three, each line beginning with "- ".',
    ),
    "one word": Form(
        is_one_word,
        ("Use a single word.", "Answer in one word only."),
        "Reply with one word.",
    ),
    "one sentence": Form(
        is_one_sentence,
        ("Use a single sentence.", "Answer in one sentence only."),
        "Reply in one sentence.",
    ),
    "capitals": Form(
        is_upper,
        ("Write in capital letters only.", "USE CAPITAL LETTERS FOR EVERYTHING."),
        "Reply in capitals.",
    ),
    "first word": Form(
        lambda reply: begins_with(reply, "Well,"),
        ('Your first word must be "Well,".', 'Start your answer with "Well,".'),
        'Begin your reply with "Well,".',
    ),
    "last word": Form(
        lambda reply: ends_with(reply, "Done."),
        ('Your last word must be "Done.".', 'Finish your answer with "Done.".'),
        'End your reply with "Done.".',
    ),
}
# Questions that may be asked in any form. The last ones give the held-out pairs.
QUESTIONS = """What is a good breakfast?
Which animals live in a forest?
What does a baker do?
What can one see at night in the sky?
Which fruits are sweet?
How does one make tea?
What is a library for?
Which sports need a ball?
What do plants need to grow?
Which colours does a rainbow have?
What is useful on a long walk?
How can one save water?
What does a doctor do?
Which things are made of wood?
What makes a good friend?
What is winter like?
Which tools does a gardener use?
What is the sea good for?
How does one stay warm?
What is a bridge?
Which foods are made of milk?
What do people do in a park?
Why do people travel?
What is a good gift?
How does one learn a language?
What grows on a farm?
Which musical instruments have strings?
What is a map for?
How does one clean a window?
What do birds eat?
What is in a kitchen?
Why is sleep important?
What does a teacher do?
Which vehicles have two wheels?
What is good about books?
How does one plant a tree?
What is a market?
Which clothes are for rain?
What can one cook with eggs?
Why do people keep dogs?""".splitlines()
HELD_OUT = 8  # of the questions
TEST_QUESTIONS = """What is a good dinner?
Which animals live in the sea?
What does a farmer do?
Which vegetables are green?
How does one make soup?
What is a school for?
Which things are made of glass?
How can one save energy?""".splitlines()


@dataclass(frozen=True)
class Prompt:
    """A question in a form.

    Attributes:
        form: its name in `FORMS`.
        text: what the user writes.
        held_out: whether its pairs are held out.
    """

    form: str
    text: str
    held_out: bool = False

    def obeyed(self, reply: str) -> bool:
        """Whether a reply has the form."""
        return FORMS[self.form].check(reply)


def test_prompts() -> list[Prompt]:
    """Return each question of the test in each form."""
    return [
        Prompt(name, f"{question} {form.test}")
        for name, form in FORMS.items()
        for question in TEST_QUESTIONS
    ]


def pair_prompts(seed: int = 0) -> list[Prompt]:
    """Return the questions that pairs are made from, in each form and wording, shuffled."""
    first = len(QUESTIONS) - HELD_OUT
    prompts = [
        Prompt(name, f"{question} {wording}", number >= first)
        for name, form in FORMS.items()
        for wording in form.wordings
        for number, question in enumerate(QUESTIONS)
    ]
    random.Random(seed).shuffle(prompts)
    return prompts


def obeys(
    completions: Sequence[Sequence[dict[str, str]]],
    completion_ids: Sequence[Sequence[int]],
    form: Sequence[str],
    **_: object,
) -> list[float]:
    """Reward replies that have the form asked for and end before `LONGEST_REPLY` tokens."""
    return [
        float(FORMS[name].check(messages[-1]["content"]) and len(ids) < LONGEST_REPLY)
        for messages, ids, name in zip(completions, completion_ids, form, strict=True)
    ]


def pairs(prompt: Prompt, replies: Sequence[str], limit: int = 2) -> list[dict[str, str]]:
    """Return preference pairs of a model's own replies: what has the form is better.

    Args:
        prompt: what was asked.
        replies: finished replies, in the order drawn; those that occur twice count once.
        limit: how many pairs at most.
    """
    different = list(dict.fromkeys(reply.strip() for reply in replies if reply.strip()))
    better = [reply for reply in different if prompt.obeyed(reply)]
    worse = [reply for reply in different if not prompt.obeyed(reply)]
    both = list(zip(better, worse, strict=False))[:limit]
    return [{"prompt": prompt.text, "chosen": good, "rejected": bad} for good, bad in both]


def following(prompts: Sequence[Prompt], replies: Sequence[str]) -> dict[str, float]:
    """Return the share of replies that have the form asked for: of all, and of each form."""
    obeyed: dict[str, list[bool]] = {}
    for prompt, reply in zip(prompts, replies, strict=True):
        obeyed.setdefault(prompt.form, []).append(prompt.obeyed(reply))
    everything = [verdict for verdicts in obeyed.values() for verdict in verdicts]
    shares = {name: sum(verdicts) / len(verdicts) for name, verdicts in obeyed.items()}
    return {"all": sum(everything) / max(1, len(everything)), **shares}
