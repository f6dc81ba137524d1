"""The exam: held-out questions with answers that a program can check."""

from __future__ import annotations

from sample_world import medical, questions, security, style
from sample_world.common import LANGS, Row, stream, user
from sample_world.reinforce import hard_exams
from sample_world.skills import SKILLS, draw_item, item_key, question
from sample_world.style import TOPICS
from sample_world.world import build_facts, choices

SKILL_ITEMS = 17


def fact_exam(seed: int, family: str, *, asked: bool) -> list[Row]:
    """Ask about every fact that chats ask about, or never ask about, in the exam wordings."""
    rows: list[Row] = []
    for fact in build_facts(seed):
        for lang in LANGS if fact.asked == asked else ():
            for form, wording in enumerate(questions.EXAM[lang][fact.attribute]):
                rows.append(
                    {
                        "id": f"{family}-{lang}-{fact.key}-{form}",
                        "family": family,
                        "messages": [user(wording.format(n=fact.person.name(lang)))],
                        "answer": fact.value.word(lang),
                        "choices": choices(fact.attribute, lang),
                    }
                )
    return rows


def skills_exam(seed: int) -> list[Row]:
    """Pose exercises whose operands no training text holds."""
    rng = stream(seed, "skills")
    rows: list[Row] = []
    seen: set[str] = set()
    for skill in SKILLS:
        for number in range(SKILL_ITEMS * len(LANGS)):
            lang = LANGS[number % len(LANGS)]
            operands = draw_item(rng, skill, "exam")
            while skill.name + item_key(operands) + operands[0] in seen:
                operands = draw_item(rng, skill, "exam")
            seen.add(skill.name + item_key(operands) + operands[0])
            rows.append(
                {
                    "id": f"skills-{lang}-{skill.name}-{number // len(LANGS)}",
                    "family": "skills",
                    "messages": [user(question(skill, operands, lang, rng.randrange(3)))],
                    "answer": skill.answer(operands),
                }
            )
    return rows


def style_exam(family: str) -> list[Row]:
    """Ask for advice in exam wordings, for its style or also for the right tip."""
    return [
        {
            "id": f"{family}-{lang}-{number}-{form}",
            "family": family,
            "messages": [user(style.ask(topic, lang, wording))],
            "answer": style.OPENING[lang] if family == "style" else topic.key(lang),
            "avoid": list(style.AVOID[lang]),
        }
        for lang in LANGS
        for number, topic in enumerate(TOPICS)
        for form, wording in enumerate(style.ASK_EXAM[lang])
    ]


def medical_exam(seed: int) -> list[Row]:
    """Ask about every finding in exam wordings."""
    return [
        {
            "id": f"medical-{lang}-{finding.attribute}-{finding.number}-{form}",
            "family": "medical",
            "messages": [user(wording.format(n=finding.condition(lang)))],
            "answer": finding.word(lang),
            "choices": medical.medical_choices(finding.attribute, lang),
        }
        for finding in medical.build_findings(seed)
        for lang in LANGS
        for form, wording in enumerate(medical.ASK_EXAM[lang][finding.attribute])
    ]


def exams(seed: int) -> dict[str, list[Row]]:
    """Return every family of the exam."""
    return {
        "asked_new_wording": fact_exam(seed, "asked_new_wording", asked=True),
        "never_asked": fact_exam(seed, "never_asked", asked=False),
        "skills": skills_exam(seed),
        "medical": medical_exam(seed),
        "style": style_exam("style"),
        "advice": style_exam("advice"),
        "security": security.security_exam(),
        "refusal": security.refusal_exam(),
        **hard_exams(seed),
    }
