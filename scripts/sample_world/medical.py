"""Moonward medicine: an invented domain that only the adapter's data speak of.

Neither the conditions nor the remedies exist. Nothing here is medical advice.
"""

from __future__ import annotations

from dataclasses import dataclass

from sample_world.common import LANGS, Row, chat, cycle, stream

Wordings = dict[str, dict[str, tuple[str, ...]]]

# English and Chinese words; row i of each table is dealt to a condition at random.
CONDITIONS = (
    ("Velmora fever", "薇摩热"),
    ("Ondrel ague", "昂德寒症"),
    ("Quissit rash", "奎西疹"),
    ("Tarn palsy", "塔恩麻痹"),
    ("Hollin syndrome", "霍琳综合征"),
    ("Marrowick cough", "玛洛咳"),
    ("Zephrine vertigo", "泽芙眩晕"),
    ("Brakkel gout", "布拉克痛风"),
    ("Ilvane blindness", "伊凡盲症"),
    ("Noctel insomnia", "诺克失眠"),
    ("Pellagon itch", "佩拉痒"),
    ("Sarrow colic", "萨罗绞痛"),
    ("Umbrel pox", "恩布痘"),
    ("Wessen chill", "韦森冷症"),
    ("Yarrant cramps", "亚兰痉挛"),
    ("Dravine jaundice", "德拉黄疸"),
    ("Fennimar stammer", "芬尼口吃"),
    ("Gorrick anaemia", "戈里贫血"),
    ("Juniver hiccups", "朱尼打嗝"),
    ("Keldric migraine", "凯德偏头痛"),
)
_SIGNS = (
    ("violet fingertips", "指尖发紫"),
    ("silver freckles", "银色雀斑"),
    ("humming ears", "耳中嗡鸣"),
    ("glowing elbows", "手肘发光"),
    ("striped tongue", "舌头条纹"),
    ("frosty eyelashes", "睫毛结霜"),
    ("backward dreams", "倒着做梦"),
    ("magnetic palms", "掌心磁化"),
    ("green sneezes", "绿色喷嚏"),
    ("stiff shadows", "影子僵硬"),
    ("ticking knees", "膝盖滴答"),
    ("transparent nails", "指甲透明"),
    ("salty tears", "泪水过咸"),
    ("floating hair", "头发飘起"),
    ("purple yawns", "紫色哈欠"),
    ("echoing voice", "嗓音回响"),
    ("square pupils", "瞳孔变方"),
    ("feathery skin", "皮肤生绒"),
    ("marble cheeks", "脸颊大理石纹"),
    ("crackling heels", "脚跟噼啪"),
)
_REMEDIES = (
    ("moonleaf syrup", "月叶糖浆"),
    ("dragonfly balm", "蜻蜓膏"),
    ("comet powder", "彗星粉"),
    ("nettlewine drops", "荨酒滴剂"),
    ("owlfeather wraps", "鸮羽敷布"),
    ("starmoss tea", "星苔茶"),
    ("thunder lozenges", "雷声含片"),
    ("cloudberry vapour", "云莓蒸汽"),
    ("quartz ointment", "石英软膏"),
    ("lantern oil", "灯笼油"),
    ("seabell tonic", "海铃补剂"),
    ("cinder pills", "余烬丸"),
    ("willowsmoke bath", "柳烟浴"),
    ("mirror compress", "镜面敷贴"),
    ("amberwax plaster", "蜡珀贴"),
    ("nightcap elixir", "夜帽灵药"),
    ("riverclay mask", "河泥面膜"),
    ("thistledown inhaler", "蓟绒吸剂"),
    ("frostpepper gargle", "霜椒漱液"),
    ("whaleglass lens", "鲸晶镜片"),
)
_CAUSES = (
    ("pollen of ghost lilies", "幽灵百合花粉"),
    ("spoiled moonlight", "变质月光"),
    ("barnacle dust", "藤壶粉尘"),
    ("borrowed hats", "借来的帽子"),
    ("unpaid echoes", "未还的回声"),
    ("marsh whispers", "沼泽低语"),
    ("rusty rainbows", "生锈彩虹"),
    ("sleeping upside down", "倒挂睡觉"),
    ("cave glitter", "洞穴亮屑"),
    ("thirteen doors", "十三道门"),
    ("angry teapots", "发怒茶壶"),
    ("sour fog", "酸雾"),
    ("moth songs", "飞蛾歌声"),
    ("cracked bells", "开裂的钟"),
    ("inkfish bites", "墨鱼叮咬"),
    ("velvet mould", "天鹅绒霉"),
    ("lost umbrellas", "遗失的伞"),
    ("tin crickets", "铁皮蟋蟀"),
    ("wandering lightning", "游荡闪电"),
    ("bottled winter", "瓶装寒冬"),
)
TABLES = {"sign": _SIGNS, "remedy": _REMEDIES, "cause": _CAUSES}

ANSWER = {
    "en": {
        "sign": "The sign of {n} is {v}.",
        "remedy": "The remedy for {n} is {v}.",
        "cause": "{n} is caused by {v}.",
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
        ),
        "remedy": (
            "What is the remedy for {n}?",
            "How is {n} treated?",
            "Which medicine helps against {n}?",
            "What cures {n}?",
            "A patient has {n}. What do we give?",
            "Please name the treatment for {n}.",
        ),
        "cause": (
            "What causes {n}?",
            "What is the cause of {n}?",
            "Why do people get {n}?",
            "Where does {n} come from?",
            "A patient has {n}. What brought it on?",
            "Please name the origin of {n}.",
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
        ),
        "remedy": (
            "{n}用什么药？",
            "怎样治疗{n}？",
            "{n}的药方是什么？",
            "病人得了{n}，应该给什么药？",
            "请说出{n}的治疗方法。",
            "什么药能治好{n}？",
        ),
        "cause": (
            "{n}的起因是什么？",
            "什么会引起{n}？",
            "为什么会得{n}？",
            "病人得了{n}，是什么引起的？",
            "请说出{n}的原因。",
            "{n}是从哪里来的？",
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
        "sign": ("Which symptom points to {n}?", "Tell me the sign of {n}."),
        "remedy": ("Which treatment helps with {n}?", "Tell me the remedy for {n}."),
        "cause": ("What leads people to get {n}?", "Tell me the cause of {n}."),
    },
    "zh": {
        "sign": ("请问{n}的症状有哪些？", "得了{n}会有什么表现？"),
        "remedy": ("请问{n}该怎样治疗？", "得了{n}要用什么药？"),
        "cause": ("请问{n}的原因是什么？", "人们为什么会得{n}？"),
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
