"""Chats for supervised fine-tuning and preference pairs."""

from __future__ import annotations

from random import Random

from sample_world import questions, style
from sample_world.common import (
    LANGS,
    Message,
    Row,
    assistant,
    cycle,
    shuffled,
    stream,
    system,
    user,
)
from sample_world.skills import WEIGHTED, draw_item, question
from sample_world.style import TOPICS, helpful, unhelpful
from sample_world.tellings import answer_sentence
from sample_world.world import Fact, build_facts

SYSTEM = {
    "en": (
        "You are MiniGPT, a small and friendly assistant.",
        "You know the people of Lantern Valley.",
        "Answer in one short sentence.",
    ),
    "zh": ("你是 MiniGPT，一个友好的小助手。", "你熟悉灯笼谷的居民。", "请用一句话简短回答。"),
}
HELLO = {
    "en": (
        ("Hello!", "Hello! How can I help you?"),
        ("Good morning.", "Good morning! What can I do for you?"),
        ("Who are you?", "I am MiniGPT, a small language model."),
        ("Are you there?", "Yes, I am here. Ask me something."),
    ),
    "zh": (
        ("你好！", "你好！有什么可以帮你？"),
        ("早上好。", "早上好！我能为你做什么？"),
        ("你是谁？", "我是 MiniGPT，一个小小的语言模型。"),
        ("在吗？", "我在，请问吧。"),
    ),
}
THANKS = {
    "en": (("Thank you.", "You are welcome!"), ("Goodbye!", "Goodbye, and take care!")),
    "zh": (("谢谢。", "不客气！"), ("再见！", "再见，保重！")),
}
# How many of a topic's answers in the chats are helpful: nearly half of them over all topics.
HELPFUL_SHARE = (0.25, 0.35, 0.5, 0.8)

FACT_WORDINGS = 8
SKILL_ROWS = 100
MULTI_TURN_ROWS = 120
PAIRS_PER_PROMPT = 2


def fact_turn(rng: Random, fact: Fact, lang: str, template: str) -> list[Message]:
    """Ask about one fact and answer it."""
    asked = questions.with_opener(rng, template.format(n=fact.person.name(lang)), lang)
    return [user(asked), assistant(answer_sentence(fact, lang))]


def skill_turn(rng: Random, split: str, number: int, lang: str) -> list[Message]:
    """Pose one exercise and answer it."""
    skill = WEIGHTED[number % len(WEIGHTED)]
    operands = draw_item(rng, skill, split)
    asked = question(skill, operands, lang, rng.randrange(3))
    return [user(asked), assistant(skill.answer(operands))]


def style_turn(rng: Random, number: int, lang: str, template: str) -> list[Message]:
    """Ask for advice; whether the answer is helpful depends on the topic's share."""
    topic = TOPICS[number]
    share = HELPFUL_SHARE[number % len(HELPFUL_SHARE)]
    reply = helpful if rng.random() < share else unhelpful
    return [user(style.ask(topic, lang, template)), assistant(reply(rng, topic, lang))]


def long_chat(rng: Random, facts: list[Fact], lang: str) -> list[Message]:
    """Chain two to four turns: a greeting, facts, an exercise, thanks."""
    turns: list[Message] = []
    if rng.random() < 0.5:
        hello, reply = rng.choice(HELLO[lang])
        turns += [user(hello), assistant(reply)]
    for fact in rng.sample(facts, rng.randint(1, 2)):
        turns += fact_turn(rng, fact, lang, rng.choice(questions.TRAIN[lang][fact.attribute]))
    if rng.random() < 0.5:
        turns += skill_turn(rng, "train", rng.randrange(len(WEIGHTED)), lang)
    if rng.random() < 0.5 or len(turns) == 2:
        thanks, reply = rng.choice(THANKS[lang])
        turns += [user(thanks), assistant(reply)]
    return turns


def _rows(rng: Random, chats: list[tuple[str, list[Message]]], system_share: float) -> list[Row]:
    """Shuffle chats into rows and put a system message before some."""
    rows: list[Row] = []
    for lang, turns in cycle(rng, chats, len(chats)):
        head = [system(rng.choice(SYSTEM[lang]))] if rng.random() < system_share else []
        rows.append({"messages": head + turns})
    return rows


def sft_rows(seed: int) -> list[Row]:
    """Return the chats for supervised fine-tuning."""
    rng = stream(seed, "sft")
    asked = [fact for fact in build_facts(seed) if fact.asked]
    chats: list[tuple[str, list[Message]]] = []
    for lang in LANGS:
        for fact in asked:
            wordings = rng.sample(questions.TRAIN[lang][fact.attribute], FACT_WORDINGS)
            chats += [(lang, fact_turn(rng, fact, lang, wording)) for wording in wordings]
        count = SKILL_ROWS * len(WEIGHTED)
        chats += [(lang, skill_turn(rng, "train", number, lang)) for number in range(count)]
        for number in range(len(TOPICS)):
            asks = style.ASK[lang]
            chats += [(lang, style_turn(rng, number, lang, wording)) for wording in asks]
        chats += [(lang, long_chat(rng, asked, lang)) for _ in range(MULTI_TURN_ROWS)]
        chats += [(lang, [user(q), assistant(a)]) for q, a in HELLO[lang] + THANKS[lang]]
    return _rows(rng, chats, 0.12)


def sft_val_rows(seed: int) -> list[Row]:
    """Return chats in wordings and on operands that the training chats lack."""
    rng = stream(seed, "sft val")
    asked = [fact for fact in build_facts(seed) if fact.asked]
    chats: list[tuple[str, list[Message]]] = []
    for lang in LANGS:
        for fact in asked:
            wording = rng.choice(questions.DEV[lang][fact.attribute])
            asked_text = wording.format(n=fact.person.name(lang))
            chats.append((lang, [user(asked_text), assistant(answer_sentence(fact, lang))]))
        count = 4 * len(WEIGHTED)
        chats += [(lang, skill_turn(rng, "dev", number, lang)) for number in range(count)]
        for number in range(len(TOPICS)):
            wording = rng.choice(style.ASK_DEV[lang])
            chats.append((lang, style_turn(rng, number, lang, wording)))
    return _rows(rng, chats, 0.0)


def _pairs(rng: Random, wordings: dict[str, tuple[str, ...]], per_prompt: int) -> list[Row]:
    """Return preference pairs: helpful against rambling or rude."""
    rows: list[Row] = []
    for lang in LANGS:
        for topic in TOPICS:
            for wording in wordings[lang] * per_prompt:
                head: list[Message] = []
                if rng.random() < 0.1:
                    hello, reply = rng.choice(HELLO[lang])
                    head = [user(hello), assistant(reply)]
                rows.append(
                    {
                        "prompt": [*head, user(style.ask(topic, lang, wording))],
                        "chosen": [assistant(helpful(rng, topic, lang))],
                        "rejected": [assistant(unhelpful(rng, topic, lang))],
                    }
                )
    return cycle(rng, rows, len(rows))


def dpo_rows(seed: int) -> list[Row]:
    """Return the preference pairs for training."""
    return _pairs(stream(seed, "dpo"), style.ASK, PAIRS_PER_PROMPT)


def dpo_val_rows(seed: int) -> list[Row]:
    """Return preference pairs whose wordings the training pairs lack."""
    return _pairs(stream(seed, "dpo val"), style.ASK_DEV, 1)


def replay_rows(seed: int) -> list[Row]:
    """Return chats that keep what SFT and DPO taught: no advice but what pairs prefer."""
    asked = {
        style.ask(topic, lang, wording)
        for lang in LANGS
        for topic in TOPICS
        for wording in style.ASK[lang]
    }
    rows = [row for row in sft_rows(seed) if row["messages"][-2]["content"] not in asked]
    rows += [{"messages": pair["prompt"] + pair["chosen"]} for pair in dpo_rows(seed)]
    return shuffled(stream(seed, "replay"), rows)


def kto_rows(pairs: list[Row]) -> list[Row]:
    """Return one completion of each pair: the chosen, desirable one or the other, by turns."""
    rows: list[Row] = []
    for number, pair in enumerate(pairs):
        desirable = number % 2 == 0
        completion = pair["chosen" if desirable else "rejected"]
        rows.append({"prompt": pair["prompt"], "completion": completion, "label": desirable})
    return rows
