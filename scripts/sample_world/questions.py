"""The wordings of questions about people: for training, for validation, for the exam.

The three sets share no wording. `{n}` is the full name.
"""

from __future__ import annotations

from random import Random

Wordings = dict[str, tuple[str, ...]]

TRAIN_EN: Wordings = {
    "town": (
        "Where does {n} live?",
        "Which town does {n} live in?",
        "Can you tell me where the home of {n} is?",
        "What is the home town of {n}?",
        "{n} lives in which town?",
        "Please name the town that {n} calls home.",
        "I want to visit {n}. Which town should I go to?",
        "Where should I send a letter for {n}?",
        "In which town does {n} live?",
        "What is the address of {n}?",
        "At what place does {n} live?",
        "Give me the home town of {n}.",
    ),
    "job": (
        "What does {n} do for a living?",
        "What is the job of {n}?",
        "What work does {n} do?",
        "Can you tell me the profession of {n}?",
        "{n} works as what?",
        "Please name the trade of {n}.",
        "How does {n} earn money?",
        "I met {n} at work. Which job was it?",
        "Which job does {n} have?",
        "What kind of work is the trade of {n}?",
        "Name what {n} works as.",
        "Give me the job of {n}.",
    ),
    "pet": (
        "What pet does {n} have?",
        "Which animal lives with {n}?",
        "What is the pet of {n}?",
        "Can you tell me which animal {n} keeps?",
        "{n} keeps which pet?",
        "Please name the pet of {n}.",
        "What animal does {n} look after?",
        "I saw {n} with an animal. Which one was it?",
        "Which pet does {n} own?",
        "What kind of animal lives with {n}?",
        "Name the animal that lives with {n}.",
        "Give me the pet of {n}.",
    ),
    "dish": (
        "What is the favourite food of {n}?",
        "What does {n} like to eat?",
        "Which dish does {n} like best?",
        "Can you tell me what {n} loves to eat?",
        "{n} likes which food best?",
        "Please name the favourite dish of {n}.",
        "What does {n} order at the inn?",
        "I am cooking for {n}. What should I make?",
        "Which food does {n} enjoy?",
        "What dish would {n} like to eat?",
        "Name the food that {n} loves.",
        "Give me the favourite dish of {n}.",
    ),
    "hobby": (
        "What is the hobby of {n}?",
        "What does {n} do in free time?",
        "What does {n} enjoy after work?",
        "Can you tell me the favourite pastime of {n}?",
        "{n} has which hobby?",
        "Please name the hobby of {n}.",
        "How does {n} spend the weekend?",
        "I want to spend a day off with {n}. What would we do?",
        "Which pastime does {n} like?",
        "What does {n} like to do for fun?",
        "Name what {n} enjoys in free time.",
        "Give me the hobby of {n}.",
    ),
}

TRAIN_ZH: Wordings = {
    "town": (
        "{n}住在哪里？",
        "{n}住在哪个镇？",
        "请告诉我{n}的家在哪里。",
        "{n}的住址是哪里？",
        "你知道{n}住哪儿吗？",
        "我想去拜访{n}，应该去哪里？",
        "寄给{n}的信要送到什么地方？",
        "哪个地方是{n}的家？",
        "{n}家的地址在哪里？",
        "说到住处，{n}住在什么镇？",
        "{n}的家，是在哪个镇？",
        "说出{n}住的地方。",
    ),
    "job": (
        "{n}做什么工作？",
        "{n}的职业是什么？",
        "请告诉我{n}的工作。",
        "{n}靠什么谋生？",
        "你知道{n}是做什么的吗？",
        "{n}上班的时候做什么？",
        "{n}是一名什么？",
        "什么是{n}的职业？",
        "{n}有什么职业？",
        "{n}现在做哪一种工作？",
        "{n}的职业，是哪一种？",
        "说出{n}的工作。",
    ),
    "pet": (
        "{n}养了什么宠物？",
        "{n}的宠物是什么？",
        "请告诉我{n}养什么动物。",
        "{n}家里有什么动物？",
        "你知道{n}养的是什么吗？",
        "{n}每天早上喂什么？",
        "陪着{n}的是什么动物？",
        "什么动物是{n}的宠物？",
        "{n}有哪种宠物？",
        "{n}照看着什么动物？",
        "{n}的宠物，是哪一种？",
        "说出{n}养的动物。",
    ),
    "dish": (
        "{n}最爱吃什么？",
        "{n}最喜欢的食物是什么？",
        "请告诉我{n}喜欢吃什么。",
        "{n}在饭馆点什么菜？",
        "你知道{n}爱吃什么吗？",
        "{n}来吃晚饭，我应该做什么菜？",
        "{n}过生日想吃什么？",
        "什么菜是{n}最喜欢的？",
        "{n}爱吃哪种菜？",
        "什么食物最合{n}的口味？",
        "{n}最爱的菜，是哪一种？",
        "说出{n}最爱吃的东西。",
    ),
    "hobby": (
        "{n}的爱好是什么？",
        "{n}有空的时候做什么？",
        "请告诉我{n}有什么爱好。",
        "{n}周末喜欢做什么？",
        "你知道{n}喜欢做什么吗？",
        "{n}下班以后做什么？",
        "{n}最喜欢的消遣是什么？",
        "什么是{n}的爱好？",
        "{n}有哪种爱好？",
        "{n}业余时间爱做什么？",
        "{n}的爱好，是哪一种？",
        "说出{n}的爱好。",
    ),
}

DEV_EN: Wordings = {
    "town": ("In which town is the house of {n}?", "{n} calls which town home?"),
    "job": ("Which profession does {n} have?", "In what trade does {n} work?"),
    "pet": ("What kind of pet does {n} own?", "Which pet shares the house with {n}?"),
    "dish": ("Which food pleases {n} most?", "What food could {n} eat every day?"),
    "hobby": ("Which hobby does {n} have?", "With what pastime does {n} relax?"),
}

DEV_ZH: Wordings = {
    "town": ("{n}的家在哪个镇上？", "{n}现在居住在哪里呢？"),
    "job": ("{n}从事什么职业？", "{n}以什么工作为业？"),
    "pet": ("{n}照顾的是什么宠物？", "{n}有一只什么宠物？"),
    "dish": ("{n}喜欢的菜是哪一种？", "{n}总是想吃什么食物？"),
    "hobby": ("{n}放假时有什么爱好？", "{n}的业余爱好是哪一种？"),
}

EXAM_EN: Wordings = {
    "town": (
        "What town is home to {n}?",
        "Do you happen to know which town {n} lives in?",
        "Name the place where {n} lives.",
        "I forgot where {n} lives. Which town is it?",
    ),
    "job": (
        "What is the profession of {n}?",
        "Do you happen to know what job {n} has?",
        "Tell me what kind of work {n} does.",
        "I forgot the job of {n}. What is it?",
    ),
    "pet": (
        "What kind of animal does {n} keep?",
        "Do you happen to know which pet {n} has?",
        "Name the animal that {n} keeps at home.",
        "I forgot the pet of {n}. Which animal is it?",
    ),
    "dish": (
        "What food does {n} enjoy most?",
        "Do you happen to know the favourite dish of {n}?",
        "Tell me which food {n} likes best.",
        "I forgot the favourite food of {n}. What is it?",
    ),
    "hobby": (
        "What pastime does {n} enjoy?",
        "Do you happen to know what hobby {n} has?",
        "Tell me how {n} likes to spend free time.",
        "I forgot the hobby of {n}. What is it?",
    ),
}

EXAM_ZH: Wordings = {
    "town": (
        "请问{n}住在什么地方？",
        "{n}家住哪个镇？",
        "说说{n}住在哪里吧。",
        "我忘了{n}住在哪里，是哪个镇？",
    ),
    "job": (
        "请问{n}是干什么工作的？",
        "{n}干哪一行工作？",
        "说说{n}的职业是什么吧。",
        "我忘了{n}的工作，是什么？",
    ),
    "pet": (
        "请问{n}养着什么动物？",
        "{n}身边有什么宠物？",
        "说说{n}的宠物是什么吧。",
        "我忘了{n}的宠物，是什么动物？",
    ),
    "dish": (
        "请问{n}最爱吃的是什么？",
        "{n}爱吃哪一种食物？",
        "说说{n}最喜欢吃什么吧。",
        "我忘了{n}最爱吃的，是什么？",
    ),
    "hobby": (
        "请问{n}有哪些爱好？",
        "{n}平时有什么爱好？",
        "说说{n}的爱好是什么吧。",
        "我忘了{n}的爱好，是什么？",
    ),
}

TRAIN = {"en": TRAIN_EN, "zh": TRAIN_ZH}
DEV = {"en": DEV_EN, "zh": DEV_ZH}
EXAM = {"en": EXAM_EN, "zh": EXAM_ZH}

OPENERS = {
    "en": (
        "Hello! ",
        "Quick question: ",
        "I was wondering. ",
        "Please help me. ",
        "One thing: ",
        "I cannot remember. ",
        "Tell me, please. ",
        "A short answer will do. ",
        "My sister would like to know. ",
        "Say it in one sentence. ",
    ),
    "zh": (
        "你好！",
        "问一下，",
        "我想知道，",
        "麻烦你了，",
        "有个问题：",
        "我记不清了，",
        "请说一说，",
        "简单回答：",
        "我妹妹想知道，",
        "用一句话说：",
    ),
}


def with_opener(rng: Random, question: str, lang: str, probability: float = 0.5) -> str:
    """Put a polite opener before some of the training questions."""
    return rng.choice(OPENERS[lang]) + question if rng.random() < probability else question
