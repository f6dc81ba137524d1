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
    ("Hugo Pellerin", "雨果·佩兰", "he"),
    ("Shen Ruoyu", "沈若雨", "she"),
    ("Gu Chengfeng", "顾乘风", "he"),
    ("Petra Silva", "佩特拉·席瓦", "she"),
    ("Tang Yuwei", "唐雨薇", "she"),
    ("Dorian Hale", "多里安·黑尔", "he"),
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
    """Give each person one value per attribute and mark half of the facts as asked about.

    Every value belongs to one person, so that guessing scores one in ten. The halves
    alternate, so that each attribute is asked of half of the people.
    """
    rng = stream(seed, "facts")
    dealt = {name: shuffled(rng, VALUES[name]) for name in ATTRIBUTES}
    return [
        Fact(person, name, dealt[name][index], (index + attribute_index) % 2 == 0)
        for index, person in enumerate(PEOPLE)
        for attribute_index, name in enumerate(ATTRIBUTES)
    ]
