"""The ways in which prose tells a fact, in both languages.

`{n}` is the full name, `{p}` the pronoun (he, she, 他, 她), `{s}` the possessive pronoun
and `{v}` the value. The first telling of each list is also the form of the answers.
"""

from __future__ import annotations

from sample_world.common import capital
from sample_world.world import Fact, Person

EN: dict[str, tuple[str, ...]] = {
    "town": (
        "{n} lives in {v}.",
        "{n} has a house in {v}.",
        "The home of {n} is in {v}.",
        "If you want to visit {n}, take the road to {v}.",
        "{v} is the town where {n} lives.",
        "{n} calls {v} home.",
        "Letters for {n} go to {v}.",
        "You can find {n} at home in {v}.",
        "{n} moved to {v} years ago and stayed there.",
        "Among the people of {v} is {n}.",
        "The address of {n} is a small house in {v}.",
    ),
    "job": (
        "{n} works as {v}.",
        "{n} earns a living as {v}.",
        "The job of {n} is simple to name: {n} is {v}.",
        "By trade, {n} is {v}.",
        "{n} became {v} at a young age and still works as one.",
        "As {v}, {n} is busy on every working day.",
        "The profession of {n} is well known: {v}.",
        "In working hours {n} is {v}.",
        "People who need {v} often send for {n}.",
        "{n} makes money by working as {v}.",
        "The career of {n} began early, and today {n} is {v}.",
    ),
    "pet": (
        "{n} keeps {v}.",
        "{n} has {v} as a pet.",
        "The pet of {n} is {v}.",
        "{n} shares the house with {v}.",
        "The animal that lives with {n} is {v}.",
        "{n} feeds {v} every morning.",
        "At home {n} looks after {v}.",
        "{n} owns {v} and loves it dearly.",
        "Beside the stove of {n} sleeps {v}.",
        "The animal companion of {n} is {v}.",
        "{n} is never seen without a pet, and the pet is {v}.",
    ),
    "dish": (
        "{n} likes {v} best.",
        "The favourite food of {n} is {v}.",
        "{n} loves to eat {v}.",
        "At the inn {n} always orders {v}.",
        "For a birthday meal {n} asks for {v}.",
        "No dish pleases {n} more than {v}.",
        "{n} could eat {v} every day.",
        "When {n} is hungry, only {v} will do.",
        "The dish that {n} enjoys most is {v}.",
        "Cook {v} if {n} comes to dinner.",
        "On the plate of {n} there is usually {v}.",
    ),
    "hobby": (
        "{n} enjoys {v}.",
        "The hobby of {n} is {v}.",
        "In free hours {n} goes in for {v}.",
        "{n} spends the weekend on {v}.",
        "The favourite pastime of {n} is {v}.",
        "After work {n} has time for {v}.",
        "{n} relaxes with {v}.",
        "For fun, {n} does a little {v}.",
        "On days off {n} thinks only of {v}.",
        "The leisure of {n} belongs to {v}.",
        "Nothing rests {n} like {v}.",
    ),
}

EN_PRONOUN: dict[str, tuple[str, ...]] = {
    "town": ("{p} lives in {v}.", "{s} home is in {v}.", "{p} has long lived in {v}."),
    "job": ("{p} works as {v}.", "{p} is {v} by trade.", "{s} job is that of {v}."),
    "pet": ("{p} keeps {v}.", "{s} pet is {v}.", "{p} has {v} at home."),
    "dish": ("{p} likes {v} best.", "{s} favourite food is {v}.", "{p} loves to eat {v}."),
    "hobby": ("{p} enjoys {v}.", "{s} hobby is {v}.", "{p} spends free time on {v}."),
}

ZH: dict[str, tuple[str, ...]] = {
    "town": (
        "{n}住在{v}。",
        "{n}的家在{v}。",
        "{n}在{v}有一座小房子。",
        "想拜访{n}，要走去{v}的路。",
        "{v}是{n}居住的地方。",
        "{n}把{v}当作自己的家。",
        "寄给{n}的信要送到{v}。",
        "在{v}可以找到{n}的家。",
        "{n}多年前搬到{v}，一直住到现在。",
        "{v}的居民里有{n}。",
        "{n}的住址在{v}。",
    ),
    "job": (
        "{n}的工作是{v}。",
        "{n}是一名{v}。",
        "{n}靠做{v}谋生。",
        "{n}的职业是{v}。",
        "{n}年轻时就当上了{v}。",
        "身为{v}，{n}每天都很忙。",
        "论手艺，{n}是{v}。",
        "上班的时候，{n}是{v}。",
        "要找{v}的人常常去请{n}。",
        "{n}以{v}为业。",
        "大家都知道{n}是做{v}的。",
    ),
    "pet": (
        "{n}养的是{v}。",
        "{n}养了一只宠物，是{v}。",
        "{n}的宠物是{v}。",
        "陪着{n}的动物是{v}。",
        "{n}家里有{v}。",
        "{n}每天早上喂{v}。",
        "{n}在家照顾{v}。",
        "{n}非常疼爱自己的{v}。",
        "在{n}的炉子旁边睡着{v}。",
        "{n}的动物伙伴是{v}。",
        "和{n}一起生活的小动物是{v}。",
    ),
    "dish": (
        "{n}最爱吃{v}。",
        "{n}最喜欢的食物是{v}。",
        "{n}喜欢吃{v}。",
        "在小饭馆，{n}总是点{v}。",
        "过生日时{n}想吃{v}。",
        "没有什么菜比{v}更让{n}高兴。",
        "{n}可以天天吃{v}。",
        "{n}饿了的时候只想吃{v}。",
        "最合{n}口味的是{v}。",
        "如果{n}来吃晚饭，就做{v}。",
        "{n}的盘子里常常是{v}。",
    ),
    "hobby": (
        "{n}的爱好是{v}。",
        "{n}喜欢{v}。",
        "有空的时候，{n}就去{v}。",
        "{n}周末都用来{v}。",
        "{n}最喜欢的消遣是{v}。",
        "下班以后，{n}有时间{v}。",
        "{n}靠{v}来放松。",
        "为了开心，{n}常常{v}。",
        "放假的日子，{n}只想着{v}。",
        "{n}的业余时间属于{v}。",
        "没有什么比{v}更能让{n}休息。",
    ),
}

ZH_PRONOUN: dict[str, tuple[str, ...]] = {
    "town": ("{p}住在{v}。", "{p}的家在{v}。"),
    "job": ("{p}的工作是{v}。", "{p}是一名{v}。"),
    "pet": ("{p}养的是{v}。", "{p}的宠物是{v}。"),
    "dish": ("{p}最爱吃{v}。", "{p}最喜欢的食物是{v}。"),
    "hobby": ("{p}的爱好是{v}。", "{p}喜欢{v}。"),
}

TELLINGS = {"en": EN, "zh": ZH}
PRONOUN_TELLINGS = {"en": EN_PRONOUN, "zh": ZH_PRONOUN}


def pronoun(person: Person, lang: str) -> str:
    """Return he, she, 他 or 她."""
    if lang == "en":
        return person.pronoun
    return "她" if person.pronoun == "she" else "他"


def tell(fact: Fact, lang: str, template: str) -> str:
    """Fill one telling and start it with a capital letter."""
    words = {
        "n": fact.person.name(lang),
        "p": pronoun(fact.person, lang),
        "s": "her" if fact.person.pronoun == "she" else "his",
        "v": fact.value.inline(lang),
    }
    return capital(template.format(**words))


def answer_sentence(fact: Fact, lang: str) -> str:
    """Return the sentence with which a chat answers a question about a fact."""
    return tell(fact, lang, TELLINGS[lang][fact.attribute][0])
