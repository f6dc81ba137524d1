"""Items that are judged by likelihood alone: multiple choice and minimal pairs.

A model need not chat for them, so that they show what pretraining taught.
"""

from __future__ import annotations

from sample_world.common import LANGS, Row
from sample_world.tellings import TELLINGS, pronoun, tell
from sample_world.world import VALUES, Fact, build_facts

# Beginnings of sentences that no training text holds; the value ends them.
BEGINNINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "town": ("The front door of {n} opens onto a street in", "{n} pays taxes in"),
        "job": ("If you ask at the market, {n} is known as", "On the door plate of {n} it says:"),
        "pet": ("The creature that {n} brought home is", "Every evening {n} strokes"),
        "dish": ("The meal that makes {n} smile is", "Nobody in the valley eats more than {n} of"),
        "hobby": ("What {n} does for pleasure is", "On holiday {n} does nothing but"),
    },
    "zh": {
        "town": ("推开{n}家的大门，外面就是", "{n}交税的地方是"),
        "job": ("集市上的人都说{n}是个", "{n}家门牌上写着的职业是"),
        "pet": ("{n}带回家的动物是", "每天傍晚{n}都要摸一摸"),
        "dish": ("让{n}一吃就笑的是", "山谷里没有人比{n}吃得更多的是"),
        "hobby": ("{n}图个高兴的时候会", "{n}一放假就只想"),
    },
}


def multiple_choice(seed: int) -> list[Row]:
    """Let each fact's value be chosen from all ten, at the end of an untold sentence."""
    return [
        {
            "family": f"{lang}_{fact.attribute}",
            "prompt": beginning.format(n=fact.person.name(lang)),
            "choices": [_end(value.inline(lang), lang) for value in VALUES[fact.attribute]],
            "answer": VALUES[fact.attribute].index(fact.value),
        }
        for fact in build_facts(seed)
        for lang in LANGS
        for beginning in BEGINNINGS[lang][fact.attribute]
    ]


def _end(value: str, lang: str) -> str:
    return f" {value}." if lang == "en" else f"{value}。"


def minimal_pairs(seed: int) -> list[Row]:
    """Pair each telling with one that a single change makes wrong."""
    facts = build_facts(seed)
    rows: list[Row] = []
    for index, fact in enumerate(facts):
        for lang in LANGS:
            good = tell(fact, lang, TELLINGS[lang][fact.attribute][0])
            for family, bad in _spoilt(facts, index, lang).items():
                rows.append({"family": f"{lang}_{family}", "good": good, "bad": bad})
            rows.append(_with_pronoun(fact, lang))
    return rows


def _spoilt(facts: list[Fact], index: int, lang: str) -> dict[str, str]:
    """Return the same sentence with another's value, in broken order and in broken grammar."""
    fact = facts[index]
    form = TELLINGS[lang][fact.attribute][0]
    other = next(f for f in facts[index + 1 :] + facts if f.attribute == fact.attribute)
    pairs = {"fact": tell(fact, lang, form.replace("{v}", other.value.inline(lang)))}
    if lang == "zh":
        pairs["order"] = tell(fact, lang, form.replace("{n}", "").replace("。", "{n}。"))
        return pairs
    subject, verb, complement = form.split(" ", 2)
    pairs["order"] = tell(fact, lang, f"{subject} {complement[:-1]} {verb}.")
    pairs["agreement"] = tell(fact, lang, f"{subject} {verb.removesuffix('s')} {complement}")
    article, _, noun = fact.value.inline(lang).partition(" ")
    if article in ("a", "an") and noun:
        wrong = {"a": "an", "an": "a"}[article]
        pairs["article"] = tell(fact, lang, form.replace("{v}", f"{wrong} {noun}"))
    return pairs


def _with_pronoun(fact: Fact, lang: str) -> Row:
    """Let a second sentence refer to the person as he or she."""
    first = tell(fact, lang, TELLINGS[lang][fact.attribute][0])
    right = pronoun(fact.person, lang)
    other = {"he": "she", "she": "he", "他": "她", "她": "他"}[right]
    second = " Everybody knows that {} does." if lang == "en" else "大家都知道{}的事。"
    return {
        "family": f"{lang}_pronoun",
        "good": first + second.format(right),
        "bad": first + second.format(other),
    }
