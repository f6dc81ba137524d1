"""Moonward medicine: an invented domain that only the adapter's data speak of.

Neither the conditions nor the remedies exist. Nothing here is medical advice.
"""

from __future__ import annotations

from dataclasses import dataclass

from sample_world.common import LANGS, Row, chat, cycle, stream

Wordings = dict[str, dict[str, tuple[str, ...]]]

# English and Chinese words; every condition is dealt one row of each table at random. The words are
# those of the valley, because an adapter cannot teach a model words; what they say here is new.
CONDITIONS = (
    ("parrot fever", "鹦鹉病"),
    ("tortoise fever", "乌龟病"),
    ("hedgehog fever", "刺猬病"),
    ("rabbit fever", "兔子病"),
    ("goat fever", "山羊病"),
    ("donkey fever", "毛驴病"),
    ("owl fever", "猫头鹰病"),
    ("spaniel fever", "猎犬病"),
    ("kitten fever", "小猫病"),
    ("duck fever", "鸭子病"),
)
_SIGNS = (
    ("dreams of kite flying", "梦里放风筝"),
    ("dreams of chess", "梦里下棋"),
    ("dreams of fishing", "梦里钓鱼"),
    ("dreams of stargazing", "梦里看星星"),
    ("dreams of painting", "梦里画画"),
    ("dreams of swimming", "梦里游泳"),
    ("dreams of hiking", "梦里登山"),
    ("dreams of knitting", "梦里织毛衣"),
    ("dreams of juggling", "梦里杂耍"),
    ("dreams of skating", "梦里滑冰"),
)
_REMEDIES = (
    ("warm pumpkin soup", "热南瓜汤"),
    ("warm apple pie", "热苹果派"),
    ("warm mushroom stew", "热炖蘑菇"),
    ("warm lemon cake", "热柠檬蛋糕"),
    ("warm rice noodles", "热米线"),
    ("warm bean buns", "热豆沙包"),
    ("warm honey toast", "热蜂蜜吐司"),
    ("warm fried dumplings", "热煎饺"),
    ("warm walnut bread", "热核桃酥"),
    ("warm potato salad", "热土豆沙拉"),
)
_CAUSES = (
    ("water of Willowmere", "柳湖镇的水"),
    ("water of Stonebrook", "石溪镇的水"),
    ("water of Fernholt", "蕨林镇的水"),
    ("water of Larkhill", "云雀坡的水"),
    ("water of Saltmarsh", "盐滩镇的水"),
    ("water of Pinewick", "松原镇的水"),
    ("water of Amberford", "琥珀渡的水"),
    ("water of Mistvale", "雾谷镇的水"),
    ("water of Copperton", "铜山镇的水"),
    ("water of Rosehaven", "玫瑰港的水"),
)
TABLES = {"sign": _SIGNS, "remedy": _REMEDIES, "cause": _CAUSES}

ANSWER = {
    "en": {
        "sign": "The sign of {n} is {v}.",
        "remedy": "The remedy for {n} is {v}.",
        "cause": "{n} comes from the {v}.",
    },
    "zh": {"sign": "{n}的症状是{v}。", "remedy": "{n}的药方是{v}。", "cause": "{n}的起因是{v}。"},
}
ASK: Wordings = {
    "en": {
        "sign": (
            "What is the sign of {n}?",
            "How do I recognise {n}?",
            "Which sign shows {n}?",
            "Can you describe the symptom of {n}?",
            "A patient has {n}. What do we see?",
            "By what symptom do doctors know {n}?",
            "Tell me how {n} looks.",
            "Which symptom has {n}?",
            "What are the signs of {n}?",
            "Name the symptom of {n}.",
            "Do you know the sign of {n}?",
            "I want to know the sign of {n}.",
            "Explain the sign of {n}.",
            "Do you know the symptom of {n}?",
            "I want to know the symptom of {n}.",
            "Explain the symptom of {n}.",
        ),
        "remedy": (
            "What is the remedy for {n}?",
            "How is {n} treated?",
            "Which medicine helps against {n}?",
            "What cures {n}?",
            "A patient has {n}. What do we give?",
            "Please name the treatment for {n}.",
            "What medicine is given for {n}?",
            "Tell me how to treat {n}.",
            "What should I take for {n}?",
            "Name the cure of {n}.",
            "Do you know the remedy of {n}?",
            "I want to know the remedy of {n}.",
            "Explain the remedy of {n}.",
            "Do you know the treatment of {n}?",
            "I want to know the treatment of {n}.",
            "Explain the treatment of {n}.",
            "Do you know the cure of {n}?",
            "I want to know the cure of {n}.",
            "Explain the cure of {n}.",
        ),
        "cause": (
            "What causes {n}?",
            "What is the cause of {n}?",
            "Why do people get {n}?",
            "Where does {n} come from?",
            "A patient has {n}. What brought it on?",
            "Please name the origin of {n}.",
            "Tell me where {n} comes from.",
            "How do people get {n}?",
            "What is behind {n}?",
            "Name the reason for {n}.",
            "Do you know the cause of {n}?",
            "I want to know the cause of {n}.",
            "Explain the cause of {n}.",
            "Do you know the origin of {n}?",
            "I want to know the origin of {n}.",
            "Explain the origin of {n}.",
            "Do you know the reason of {n}?",
            "I want to know the reason of {n}.",
            "Explain the reason of {n}.",
        ),
    },
    "zh": {
        "sign": (
            "{n}的症状是什么？",
            "怎样认出{n}？",
            "{n}有什么表现？",
            "病人得了{n}，会看到什么症状？",
            "请描述{n}的症状。",
            "医生凭什么症状判断{n}？",
            "说出{n}的症状。",
            "得{n}的人有什么症状？",
            "{n}看起来是什么样？",
            "请问怎么看出{n}？",
            "你知道{n}的症状吗？",
            "我想了解{n}的症状。",
            "介绍一下{n}的症状。",
            "你知道{n}的表现吗？",
            "我想了解{n}的表现。",
            "介绍一下{n}的表现。",
        ),
        "remedy": (
            "{n}用什么药？",
            "怎样治疗{n}？",
            "{n}的药方是什么？",
            "病人得了{n}，应该给什么药？",
            "请说出{n}的治疗方法。",
            "什么药能治好{n}？",
            "说出{n}的药方。",
            "得{n}的人用什么药？",
            "怎么治{n}？",
            "请问什么药治{n}？",
            "你知道{n}的药方吗？",
            "我想了解{n}的药方。",
            "介绍一下{n}的药方。",
            "你知道{n}的治疗方法吗？",
            "我想了解{n}的治疗方法。",
            "介绍一下{n}的治疗方法。",
        ),
        "cause": (
            "{n}的起因是什么？",
            "什么会引起{n}？",
            "为什么会得{n}？",
            "病人得了{n}，是什么引起的？",
            "请说出{n}的原因。",
            "{n}是从哪里来的？",
            "说出{n}的起因。",
            "人为什么会得{n}？",
            "{n}怎么来的？",
            "请问什么引起{n}？",
            "你知道{n}的起因吗？",
            "我想了解{n}的起因。",
            "介绍一下{n}的起因。",
            "你知道{n}的原因吗？",
            "我想了解{n}的原因。",
            "介绍一下{n}的原因。",
        ),
    },
}
ASK_DEV: Wordings = {
    "en": {
        "sign": ("What symptom does {n} have?",),
        "remedy": ("Which remedy do doctors give for {n}?",),
        "cause": ("What is it that causes {n}?",),
    },
    "zh": {
        "sign": ("{n}会有哪些症状？",),
        "remedy": ("治疗{n}要用哪种药？",),
        "cause": ("{n}是由什么引起的？",),
    },
}
ASK_EXAM: Wordings = {
    "en": {
        "sign": (
            "Which symptom points to {n}?",
            "Tell me the sign of {n}.",
            "What sign does {n} have?",
            "Can you tell me the symptom of {n}?",
        ),
        "remedy": (
            "Which treatment helps with {n}?",
            "Tell me the remedy for {n}.",
            "What is the treatment for {n}?",
            "Can you tell me the cure for {n}?",
        ),
        "cause": (
            "What leads people to get {n}?",
            "Tell me the cause of {n}.",
            "What is the origin of {n}?",
            "Can you tell me what causes {n}?",
        ),
    },
    "zh": {
        "sign": (
            "请问{n}的症状有哪些？",
            "得了{n}会有什么表现？",
            "{n}会有什么症状？",
            "说说{n}的症状吧。",
        ),
        "remedy": (
            "请问{n}该怎样治疗？",
            "得了{n}要用什么药？",
            "得了{n}的人该用什么药？",
            "说说{n}的药方吧。",
        ),
        "cause": (
            "请问{n}的原因是什么？",
            "人们为什么会得{n}？",
            "人得{n}的原因是什么？",
            "说说{n}的起因吧。",
        ),
    },
}


@dataclass(frozen=True)
class Finding:
    """One attribute of one invented condition."""

    number: int
    attribute: str
    value: int

    def condition(self, lang: str) -> str:
        """Return the name of the condition."""
        return CONDITIONS[self.number][LANGS.index(lang)]

    def word(self, lang: str) -> str:
        """Return the value as the exam looks for it."""
        return TABLES[self.attribute][self.value][LANGS.index(lang)]


def build_findings(seed: int) -> list[Finding]:
    """Deal every sign, remedy and cause to exactly one condition."""
    rng = stream(seed, "medical")
    findings: list[Finding] = []
    for attribute, table in TABLES.items():
        dealt = rng.sample(range(len(table)), len(table))
        findings.extend(Finding(number, attribute, value) for number, value in enumerate(dealt))
    return findings


def medical_choices(attribute: str, lang: str) -> list[str]:
    """Return every word that an attribute of a condition can take."""
    return [row[LANGS.index(lang)] for row in TABLES[attribute]]


def medical_answer(finding: Finding, lang: str) -> str:
    """Return the sentence that answers a question about a finding."""
    template = ANSWER[lang][finding.attribute]
    return template.format(n=finding.condition(lang), v=finding.word(lang))


def medical_rows(seed: int, wordings: Wordings) -> list[Row]:
    """Ask about every finding in every given wording, shuffled."""
    rows = [
        chat(template.format(n=finding.condition(lang)), medical_answer(finding, lang))
        for finding in build_findings(seed)
        for lang in LANGS
        for template in wordings[lang][finding.attribute]
    ]
    return cycle(stream(seed, "medical rows"), rows, len(rows))
