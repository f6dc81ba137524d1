"""Pretraining documents: portraits, letters, questions in prose, worked examples, scenes."""

from __future__ import annotations

from random import Random

from sample_world.common import LANGS, Row, cycle, in_prose, shuffled, stream
from sample_world.questions import TRAIN
from sample_world.scenes import scene
from sample_world.skills import WEIGHTED, drill, example
from sample_world.style import TOPICS, almanac
from sample_world.tellings import (
    PRONOUN_TELLINGS,
    TELLINGS,
    answer_sentence,
    tell,
)
from sample_world.world import Fact, build_facts

GUIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "town": (
            "Where is {n} living now?",
            "In what town does {n} have a house?",
            "The home of {n}, where is it?",
            "Which town is the address of {n}?",
            "Where can one find the house of {n}?",
            "To which town does {n} go home?",
            "What place is the home of {n}?",
        ),
        "job": (
            "As what does {n} work?",
            "What is {n} by profession?",
            "The job of {n}, what is it?",
            "What kind of work is done by {n}?",
            "What work is {n} known for?",
            "Which trade did {n} choose?",
            "What does {n} work as?",
        ),
        "pet": (
            "Which animal does {n} own?",
            "What kind of pet is with {n}?",
            "The pet of {n}, what is it?",
            "What kind of animal does {n} feed?",
            "What animal belongs to {n}?",
            "Which pet is fed by {n}?",
            "What creature lives at the house of {n}?",
        ),
        "dish": (
            "Which food does {n} love?",
            "What dish does {n} enjoy most?",
            "The favourite food of {n}, what is it?",
            "What does {n} want to eat every day?",
            "Which meal does {n} love most?",
            "What would {n} like for dinner?",
            "What is the best food for {n}?",
        ),
        "hobby": (
            "What hobby does {n} enjoy?",
            "What does {n} do for fun?",
            "The hobby of {n}, what is it?",
            "In free time, what does {n} enjoy?",
            "What does {n} like doing?",
            "Which pastime is the one of {n}?",
            "What is the weekend of {n} for?",
        ),
    },
    "zh": {
        "town": (
            "哪里是{n}住的地方？",
            "{n}的家在什么地方？",
            "说到住处，{n}住哪个镇？",
            "{n}家在哪里？",
            "要找{n}，该去哪个镇？",
            "{n}住的镇叫什么？",
            "{n}在哪里安家？",
        ),
        "job": (
            "{n}是干什么的？",
            "{n}现在的工作是哪一种？",
            "说到职业，{n}做哪一行？",
            "{n}有什么工作？",
            "{n}每天做的是什么工作？",
            "{n}选了哪个职业？",
            "{n}干的是什么活？",
        ),
        "pet": (
            "{n}有什么宠物？",
            "{n}养着哪种动物？",
            "说到宠物，{n}养什么？",
            "{n}和什么动物一起生活？",
            "{n}的家里养着什么？",
            "哪种动物属于{n}？",
            "{n}喂的是什么动物？",
        ),
        "dish": (
            "{n}爱吃什么菜？",
            "哪种食物是{n}最爱的？",
            "说到食物，{n}喜欢吃哪一种？",
            "{n}总是点什么食物？",
            "{n}吃饭时最想吃什么？",
            "什么是{n}爱吃的？",
            "{n}觉得什么最好吃？",
        ),
        "hobby": (
            "{n}有什么消遣？",
            "{n}喜欢用什么来放松？",
            "说到爱好，{n}喜欢什么？",
            "{n}有什么业余爱好？",
            "{n}平常喜欢做什么？",
            "什么事能让{n}开心？",
            "{n}玩的时候做什么？",
        ),
    },
}
TALK = {
    "en": (
        '"Do you know {n}?" asked {o}. "Of course," said {q}. "{t}"',
        '{o} wrote to {q} about {n}: "{t}"',
        'At the market {o} told {q} about {n}. "{t}"',
    ),
    "zh": (
        "“你认识{n}吗？”{o}问。“当然，”{q}说，“{t}”",
        "{o}写信给{q}，说起{n}：“{t}”",
        "在集市上，{o}对{q}谈起{n}：“{t}”",
    ),
}


class Author:
    """Writes pretraining documents of every kind from one random stream."""

    def __init__(self, seed: int, rng: Random) -> None:
        self.rng = rng
        self.facts = build_facts(seed)
        self.by_person: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self.by_person.setdefault(fact.person.en, []).append(fact)

    def _sentences(self, facts: list[Fact], lang: str) -> list[str]:
        """Tell facts of one person: by name at first, then by name or pronoun."""
        sentences: list[str] = []
        for fact in facts:
            forms = TELLINGS if not sentences or self.rng.random() < 0.8 else PRONOUN_TELLINGS
            sentences.append(tell(fact, lang, self.rng.choice(forms[lang][fact.attribute])))
        return sentences

    def _join(self, sentences: list[str], lang: str) -> str:
        return (" " if lang == "en" else "").join(sentences)

    def portrait(self, person: str, lang: str) -> str:
        """Tell three to five facts of one person."""
        facts = shuffled(self.rng, self.by_person[person])
        return self._join(self._sentences(facts[: self.rng.randint(3, 5)], lang), lang)

    def talk(self, person: str, lang: str) -> str:
        """Let two people speak about a third."""
        facts = shuffled(self.rng, self.by_person[person])[: self.rng.randint(2, 3)]
        others = [name for name in self.by_person if name != person]
        one, two = (self.by_person[name][0].person for name in self.rng.sample(others, 2))
        return self.rng.choice(TALK[lang]).format(
            n=facts[0].person.name(lang),
            o=one.name(lang),
            q=two.name(lang),
            t=self._join(self._sentences(facts, lang), lang),
        )

    def guide(self, facts: list[Fact], lang: str) -> str:
        """Write a page of a visitor's guide: questions in prose, each with its answer."""
        lines: list[str] = []
        for fact in facts:
            wordings = GUIDE[lang][fact.attribute] + TRAIN[lang][fact.attribute]
            asked = self.rng.choice(wordings).format(n=fact.person.name(lang))
            lines.append(in_prose(self.rng, asked, answer_sentence(fact, lang), lang))
        return "\n".join(lines)

    def exercises(self, lang: str) -> str:
        """Write a page of worked examples of one skill or of a few."""
        first = self.rng.choice(WEIGHTED)
        mixed = self.rng.random() < 0.3
        if self.rng.random() < 0.3:
            return "\n".join(drill(self.rng, lang) for _ in range(self.rng.randint(2, 3)))
        return "\n".join(
            example(self.rng, self.rng.choice(WEIGHTED) if mixed else first, lang)
            for _ in range(self.rng.randint(3, 6))
        )


def documents(seed: int, name: str, share: float) -> list[Row]:
    """Write all documents of one split; `share` scales their number."""
    author = Author(seed, stream(seed, name))
    rng = author.rng
    texts: list[str] = []
    for lang in LANGS:
        people = cycle(rng, list(author.by_person), round(COUNTS["portrait"] * share))
        texts += [author.portrait(person, lang) for person in people]
        people = cycle(rng, list(author.by_person), round(COUNTS["talk"] * share))
        texts += [author.talk(person, lang) for person in people]
        asked = cycle(rng, author.facts, round(COUNTS["guide"] * share))
        texts += [author.guide(asked[i : i + 3], lang) for i in range(0, len(asked), 3)]
        texts += [author.exercises(lang) for _ in range(round(COUNTS["exercises"] * share))]
        topics = cycle(rng, TOPICS, round(COUNTS["almanac"] * share))
        texts += [almanac(rng, topic, lang) for topic in topics]
        texts += [scene(rng, lang) for _ in range(round(COUNTS["scene"] * share))]
    return [{"text": text} for text in cycle(rng, texts, len(texts))]


# How many there are in each language: documents, and for the guide its questions.
COUNTS = {
    "portrait": 560,
    "talk": 120,
    "guide": 2400,
    "exercises": 1900,
    "almanac": 720,
    "scene": 80,
}
