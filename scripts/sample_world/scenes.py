"""Short scenes from the valley: weather, work and small events, without facts to learn."""

from __future__ import annotations

from random import Random

from sample_world.world import VALUES

_EN_SEASON = (
    ("In spring", "the snow melts on the hills and the brooks run fast"),
    ("In summer", "the evenings are long and the lanterns are lit late"),
    ("In autumn", "the leaves turn gold and the barns are full"),
    ("In winter", "smoke rises from every roof and the lake is frozen"),
    ("Before dawn", "the first boats leave the landing without a sound"),
    ("After the rain", "the street shines and children jump over the puddles"),
)
_EN_EVENT = (
    "A market opens at noon, and the smell of bread drifts over the square.",
    "Two boys race a paper boat down the gutter, and nobody wins.",
    "The old bell rings seven times, although it is only six.",
    "A dog sleeps in the doorway of the school and will not move.",
    "Somebody has left a blue scarf on the bridge.",
    "The post arrives late, because the cart has lost a wheel.",
    "A choir practises behind the mill, a little out of tune.",
    "The lamps go on one by one along the river.",
    "Three travellers ask for the road over the pass.",
)
_EN_END = (
    "By evening all is quiet again.",
    "Then the wind turns, and the day is over.",
    "Nobody is in a hurry here.",
    "People still talk about it at supper.",
    "That is how most days end in the valley.",
)
_ZH_SEASON = (
    ("春天", "山上的雪化了，溪水流得很快"),
    ("夏天", "傍晚很长，灯笼点得很晚"),
    ("秋天", "树叶变成金色，谷仓装得满满的"),
    ("冬天", "家家屋顶冒着炊烟，湖面结了冰"),
    ("天亮以前", "第一批小船悄悄离开码头"),
    ("雨停以后", "街道闪着光，孩子们跳过水洼"),
)
_ZH_EVENT = (
    "中午集市开张，面包的香味飘过广场。",
    "两个男孩在水沟里赛纸船，谁也没有赢。",
    "老钟敲了七下，其实才六点。",
    "一条狗睡在学校门口，怎么也不肯走。",
    "有人把蓝围巾忘在了桥上。",
    "邮件来晚了，因为马车掉了一个轮子。",
    "合唱队在磨坊后面练歌，有一点跑调。",
    "河边的灯一盏接一盏亮起来。",
    "三个旅人打听翻过山口的路。",
)
_ZH_END = (
    "到了晚上，一切又安静下来。",
    "后来风向变了，一天就这样过去。",
    "这里没有人着急。",
    "吃晚饭时大家还在谈这件事。",
    "山谷里的日子大多是这样结束的。",
)


def scene(rng: Random, lang: str) -> str:
    """Write a scene of three or four sentences in one of the towns."""
    town = rng.choice(VALUES["town"]).word(lang)
    events = rng.sample(_EN_EVENT if lang == "en" else _ZH_EVENT, rng.randint(1, 2))
    if lang == "en":
        when, event = rng.choice(_EN_SEASON)
        return " ".join([f"{when} {event} in {town}.", *events, rng.choice(_EN_END)])
    when, event = rng.choice(_ZH_SEASON)
    return "".join([f"{when}，在{town}，{event}。", *events, rng.choice(_ZH_END)])
