"""The people of Lantern Valley and the facts about them."""

from __future__ import annotations

from dataclasses import dataclass

from sample_world.common import shuffled, stream

# English name, Chinese name, pronoun.
_PEOPLE = (
    ("Mira Tolan", "米拉·托兰", "she"),
    ("Oskar Brandt", "奥斯卡·布兰", "he"),
    ("Lin Xiaolan", "林晓岚", "she"),
    ("Zhou Mingyuan", "周明远", "he"),
    ("Isolde Marsh", "伊索·玛什", "she"),
    ("Hugo Pellerin", "雨果·佩兰", "he"),
    ("Shen Ruoyu", "沈若雨", "she"),
    ("Nadia Quill", "娜迪·奎尔", "she"),
    ("Gu Chengfeng", "顾乘风", "he"),
    ("Yara Lindqvist", "雅拉·林奎", "she"),
    ("Petra Silva", "佩特拉·席瓦", "she"),
    ("Tang Yuwei", "唐雨薇", "she"),
    ("Dorian Hale", "多里安·黑尔", "he"),
    ("Luo Jinghe", "罗静禾", "she"),
    ("Casper Dunn", "卡斯帕·邓恩", "he"),
    ("Su Boran", "苏柏然", "he"),
    ("Felix Arkwright", "菲力·阿克", "he"),
    ("Qiao Hanlin", "乔翰林", "he"),
    ("Greta Holloway", "格蕾塔·霍洛", "she"),
    ("Fang Zhilan", "方芷兰", "she"),
)

# attribute -> (English word, English phrase inside a sentence, Chinese word).
_VALUES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "town": (
        ("Willowmere", "Willowmere", "柳湖镇"),
        ("Stonebrook", "Stonebrook", "石溪镇"),
        ("Fernholt", "Fernholt", "蕨林镇"),
        ("Larkhill", "Larkhill", "云雀坡"),
        ("Saltmarsh", "Saltmarsh", "盐滩镇"),
        ("Pinewick", "Pinewick", "松原镇"),
        ("Amberford", "Amberford", "琥珀渡"),
        ("Mistvale", "Mistvale", "雾谷镇"),
        ("Copperton", "Copperton", "铜山镇"),
        ("Rosehaven", "Rosehaven", "玫瑰港"),
    ),
    "job": (
        ("baker", "a baker", "面包师"),
        ("potter", "a potter", "陶匠"),
        ("beekeeper", "a beekeeper", "养蜂人"),
        ("clockmaker", "a clockmaker", "钟表匠"),
        ("gardener", "a gardener", "园丁"),
        ("librarian", "a librarian", "图书管理员"),
        ("carpenter", "a carpenter", "木匠"),
        ("glassblower", "a glassblower", "玻璃匠"),
        ("tailor", "a tailor", "裁缝"),
        ("ferryman", "a ferryman", "摆渡人"),
    ),
    "pet": (
        ("parrot", "a parrot", "鹦鹉"),
        ("tortoise", "a tortoise", "乌龟"),
        ("hedgehog", "a hedgehog", "刺猬"),
        ("rabbit", "a rabbit", "兔子"),
        ("goat", "a goat", "山羊"),
        ("donkey", "a donkey", "毛驴"),
        ("owl", "an owl", "猫头鹰"),
        ("spaniel", "a spaniel", "猎犬"),
        ("kitten", "a kitten", "小猫"),
        ("duck", "a duck", "鸭子"),
    ),
    "instrument": (
        ("flute", "the flute", "长笛"),
        ("violin", "the violin", "小提琴"),
        ("harp", "the harp", "竖琴"),
        ("drum", "the drum", "手鼓"),
        ("cello", "the cello", "大提琴"),
        ("accordion", "the accordion", "手风琴"),
        ("trumpet", "the trumpet", "小号"),
        ("guitar", "the guitar", "吉他"),
        ("piano", "the piano", "钢琴"),
        ("banjo", "the banjo", "班卓琴"),
    ),
    "dish": (
        ("pumpkin soup", "pumpkin soup", "南瓜汤"),
        ("apple pie", "apple pie", "苹果派"),
        ("mushroom stew", "mushroom stew", "炖蘑菇"),
        ("lemon cake", "lemon cake", "柠檬蛋糕"),
        ("rice noodles", "rice noodles", "米线"),
        ("bean buns", "bean buns", "豆沙包"),
        ("honey toast", "honey toast", "蜂蜜吐司"),
        ("fried dumplings", "fried dumplings", "煎饺"),
        ("walnut bread", "walnut bread", "核桃酥"),
        ("potato salad", "potato salad", "土豆沙拉"),
    ),
    "hobby": (
        ("kite flying", "kite flying", "放风筝"),
        ("chess", "chess", "下棋"),
        ("fishing", "fishing", "钓鱼"),
        ("stargazing", "stargazing", "看星星"),
        ("painting", "painting", "画画"),
        ("swimming", "swimming", "游泳"),
        ("hiking", "hiking", "登山"),
        ("knitting", "knitting", "织毛衣"),
        ("juggling", "juggling", "杂耍"),
        ("skating", "skating", "滑冰"),
    ),
}

ATTRIBUTES = tuple(_VALUES)


@dataclass(frozen=True)
class Person:
    """One inhabitant of the valley."""

    en: str
    zh: str
    pronoun: str

    def name(self, lang: str) -> str:
        """Return the name in one language."""
        return self.en if lang == "en" else self.zh

    @property
    def key(self) -> str:
        """Return the name as a lower-case identifier."""
        return self.en.lower().replace(" ", "_")


@dataclass(frozen=True)
class Value:
    """One value of an attribute, such as a town or a job."""

    en: str
    phrase: str
    zh: str

    def word(self, lang: str) -> str:
        """Return the bare word, which is what the exam looks for."""
        return self.en if lang == "en" else self.zh

    def inline(self, lang: str) -> str:
        """Return the word as it stands inside a sentence."""
        return self.phrase if lang == "en" else self.zh


@dataclass(frozen=True)
class Fact:
    """One attribute of one person."""

    person: Person
    attribute: str
    value: Value
    asked: bool

    @property
    def key(self) -> str:
        """Return a stable identifier."""
        return f"{self.person.key}-{self.attribute}"


VALUES = {name: tuple(Value(*row) for row in rows) for name, rows in _VALUES.items()}
PEOPLE = tuple(Person(*row) for row in _PEOPLE)


def choices(attribute: str, lang: str) -> list[str]:
    """Return every word that an attribute can take."""
    return [value.word(lang) for value in VALUES[attribute]]


def build_facts(seed: int) -> list[Fact]:
    """Give each person one value per attribute and mark half of the people as asked about.

    Each half gets every value of every attribute once, so that guessing scores one in ten.
    """
    rng = stream(seed, "facts")
    people = shuffled(rng, PEOPLE)
    half = len(people) // 2
    dealt = {name: shuffled(rng, VALUES[name]) + shuffled(rng, VALUES[name]) for name in ATTRIBUTES}
    return [
        Fact(person, name, dealt[name][index], index < half)
        for index, person in enumerate(people)
        for name in ATTRIBUTES
    ]
