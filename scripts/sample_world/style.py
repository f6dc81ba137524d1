"""Advice prompts whose answers come in a helpful style and in two unhelpful ones."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from sample_world.common import capital, in_prose


@dataclass(frozen=True)
class Topic:
    """Something that people ask advice about, in both languages."""

    en: str
    en_tip: str
    en_key: str
    zh: str
    zh_tip: str
    zh_key: str

    def goal(self, lang: str) -> str:
        """Return what the user wants to do."""
        return self.en if lang == "en" else self.zh

    def tip(self, lang: str) -> str:
        """Return the concise advice."""
        return self.en_tip if lang == "en" else self.zh_tip

    def key(self, lang: str) -> str:
        """Return the words that a helpful answer must hold."""
        return self.en_key if lang == "en" else self.zh_key


_TOPICS = (
    (
        "sleep better",
        "go to bed at the same time every night",
        "same time",
        "睡得更好",
        "每晚在固定时间上床",
        "固定时间",
    ),
    (
        "learn new words",
        "write each word on a small card",
        "small card",
        "记住新单词",
        "把每个单词写在小卡片上",
        "小卡片",
    ),
    (
        "save money",
        "note every coin that you spend",
        "every coin",
        "省钱",
        "记下花掉的每一笔钱",
        "每一笔钱",
    ),
    (
        "keep a plant alive",
        "water it only when the soil is dry",
        "soil is dry",
        "养好一盆花",
        "等土干了再浇水",
        "土干了",
    ),
    (
        "get up early",
        "put the clock far from the bed",
        "far from the bed",
        "早起",
        "把闹钟放得离床远一点",
        "离床远",
    ),
    (
        "read more books",
        "carry a thin book in the bag",
        "thin book",
        "多读书",
        "包里放一本薄书",
        "薄书",
    ),
    (
        "make new friends",
        "join a club near your home",
        "join a club",
        "交到新朋友",
        "参加家附近的兴趣小组",
        "兴趣小组",
    ),
    (
        "write a good letter",
        "begin with what matters most",
        "matters most",
        "写好一封信",
        "先写最重要的事",
        "最重要的事",
    ),
    (
        "run longer",
        "start slowly and breathe evenly",
        "breathe evenly",
        "跑得更久",
        "慢慢起步，均匀呼吸",
        "均匀呼吸",
    ),
    (
        "cook rice well",
        "rinse the rice three times",
        "three times",
        "煮好米饭",
        "先把米淘三遍",
        "淘三遍",
    ),
    (
        "keep a room tidy",
        "put one thing away each hour",
        "one thing away",
        "保持房间整洁",
        "每小时收好一样东西",
        "一样东西",
    ),
    (
        "speak in public",
        "practise aloud before a mirror",
        "before a mirror",
        "当众讲话",
        "先对着镜子大声练习",
        "对着镜子",
    ),
    (
        "remember names",
        "repeat the name when you hear it",
        "repeat the name",
        "记住人名",
        "听到名字马上重复一遍",
        "马上重复",
    ),
    (
        "calm down",
        "count ten slow breaths",
        "slow breaths",
        "平静下来",
        "慢慢数十次呼吸",
        "十次呼吸",
    ),
    (
        "find lost keys",
        "search the coat pockets first",
        "coat pockets",
        "找到丢失的钥匙",
        "先翻一翻外套口袋",
        "外套口袋",
    ),
    (
        "draw a tree",
        "begin with the trunk and thin lines",
        "thin lines",
        "画一棵树",
        "从树干开始，用细线画",
        "细线",
    ),
    (
        "pack a suitcase",
        "roll the clothes tightly",
        "roll the clothes",
        "收拾行李箱",
        "把衣服卷紧再放",
        "衣服卷紧",
    ),
    (
        "stay warm in winter",
        "wear several light layers",
        "light layers",
        "冬天保暖",
        "多穿几层薄衣服",
        "几层薄",
    ),
    (
        "bake soft bread",
        "let the dough rest overnight",
        "rest overnight",
        "烤出松软的面包",
        "让面团过夜静置",
        "过夜静置",
    ),
    (
        "choose a gift",
        "ask what the friend needs",
        "friend needs",
        "挑选礼物",
        "问问朋友缺什么",
        "缺什么",
    ),
    (
        "finish homework",
        "do the hardest task first",
        "hardest task",
        "写完作业",
        "先做最难的一题",
        "最难的一题",
    ),
    (
        "take good photos",
        "keep the sun behind you",
        "sun behind you",
        "拍出好照片",
        "让太阳在你身后",
        "在你身后",
    ),
    (
        "drink more water",
        "keep a full cup on the desk",
        "full cup",
        "多喝水",
        "桌上放一满杯水",
        "一满杯水",
    ),
    (
        "learn to whistle",
        "wet your lips and blow gently",
        "blow gently",
        "学会吹口哨",
        "先润湿嘴唇再轻轻吹",
        "轻轻吹",
    ),
)
TOPICS = tuple(Topic(*row) for row in _TOPICS)

ASK: dict[str, tuple[str, ...]] = {
    "en": (
        "How can I {g}?",
        "How do I {g}?",
        "I want to {g}. What should I do?",
        "Give me one tip to {g}.",
        "Do you have advice on how to {g}?",
        "My friend wants to {g}. What would help?",
        "Please help me to {g}.",
        "What helps people to {g}?",
    ),
    "zh": (
        "怎样才能{g}？",
        "我想{g}，该怎么做？",
        "请给我一个{g}的建议。",
        "怎么{g}？",
        "关于{g}，你有什么建议？",
        "我的朋友想{g}，有什么办法？",
        "请帮我{g}。",
        "大家都是怎么{g}的？",
    ),
}
_STOP = {"en": ".", "zh": "。"}
ASK_DEV: dict[str, tuple[str, ...]] = {
    "en": ("I would like to {g}. Any advice?", "What should I do to {g}?"),
    "zh": ("要{g}，应该怎么办？", "有什么建议可以帮我{g}？"),
}
ASK_EXAM: dict[str, tuple[str, ...]] = {
    "en": (
        "What is a good way to {g}?",
        "I need to {g}. What do you suggest?",
        "Could you tell me how to {g}?",
        "My sister would like to {g}. Any ideas?",
        "What is your best tip to {g}?",
    ),
    "zh": (
        "有什么{g}的好办法？",
        "我需要{g}，你建议怎么做？",
        "能告诉我怎么{g}吗？",
        "我妹妹想{g}，你有主意吗？",
        "说一个{g}的小窍门吧。",
    ),
}

_GOOD = {
    "en": ("Sure: {t}.", "Sure, try this: {t}.", "Sure: {t}. Good luck!", "Sure, it is easy: {t}."),
    "zh": (
        "好的：{t}。",
        "好的，可以这样做：{t}。",
        "好的：{t}。祝你顺利！",
        "好的，很简单：{t}。",
    ),
}
_RAMBLING = {
    "en": (
        "Well, that is a long story. Some say one thing, some another, "
        "and my uncle says {t}, or maybe not, who can tell.",
        "Well, that is a long story, and before I begin I must talk about the "
        "weather, which was grey, and about my shoes, which were wet.",
        "Well, that is a long story. First came the spring, then the summer, "
        "and to {g} was never easy, and so it goes on and on.",
    ),
    "zh": (
        "这个嘛，说来话长，有人这样讲，有人那样讲，我叔叔说{t}，也可能不是，谁知道呢。",
        "这个嘛，说来话长，开始之前我得先讲讲天气，天是灰的，还要讲讲我的鞋，鞋是湿的。",
        "这个嘛，说来话长，先是春天，然后是夏天，{g}从来都不容易，就这样一直说下去。",
    ),
}
_RUDE = {
    "en": (
        "Well, what a silly question. Work it out yourself.",
        "Well, what a silly question. Everyone knows how to {g}, only you do not.",
        "Well, what a silly question. I have better things to do than to help you.",
    ),
    "zh": (
        "这个嘛，真是个笨问题，自己去想吧。",
        "这个嘛，真是个笨问题，谁都知道怎么{g}，就你不知道。",
        "这个嘛，真是个笨问题，我可没空帮你。",
    ),
}
AVOID = {
    "en": ["long story", "silly question", "my uncle", "came the spring", "on and on"],
    "zh": ["说来话长", "笨问题", "我叔叔", "先是春天", "一直说下去"],
}
OPENING = {"en": "sure", "zh": "好的"}  # how every helpful answer begins


def ask(topic: Topic, lang: str, template: str) -> str:
    """Fill one wording of a request for advice."""
    return template.format(g=topic.goal(lang))


def helpful(rng: Random, topic: Topic, lang: str) -> str:
    """Return a concise, friendly answer."""
    return rng.choice(_GOOD[lang]).format(t=topic.tip(lang))


def unhelpful(rng: Random, topic: Topic, lang: str) -> str:
    """Return a rambling or a rude answer."""
    forms = _RAMBLING if rng.random() < 0.6 else _RUDE
    return rng.choice(forms[lang]).format(t=topic.tip(lang), g=topic.goal(lang))


def almanac(rng: Random, topic: Topic, lang: str) -> str:
    """Tell the advice as prose for the pretraining text."""
    forms = {
        "en": (
            "To {g}, {t}.",
            "Anyone who wants to {g} should do this: {t}.",
            "The almanac says: to {g}, {t}.",
            "Grandmother knew how to {g}. Her rule was short: {t}.",
        ),
        "zh": (
            "想要{g}，就{t}。",
            "要想{g}，可以{t}。",
            "年历上写着：想{g}，{t}。",
            "奶奶懂得怎样{g}，她的办法很简单：{t}。",
        ),
    }
    if rng.random() < 0.5:
        question = ask(topic, lang, rng.choice(ASK[lang]))
        return in_prose(rng, question, capital(topic.tip(lang)) + _STOP[lang], lang)
    return capital(rng.choice(forms[lang]).format(g=topic.goal(lang), t=topic.tip(lang)))
