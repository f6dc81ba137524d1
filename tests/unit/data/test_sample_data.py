"""The bundled sample data: reproducible, well-formed, and with an exam that is held out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "data"
sys.path.insert(0, str(ROOT / "scripts"))

from sample_world import medical, questions, security, skills, style, world  # noqa: E402
from sample_world.common import stream  # noqa: E402
from sample_world.tellings import TELLINGS, tell  # noqa: E402

FAMILIES = ("asked_new_wording", "never_asked", "skills", "medical", "style", "advice")
HARD = ("reverse_digits", "add_carry", "sort_digits", "count_letters")
FAMILIES += ("security", "refusal", *HARD)
STAGES = ("pretrain", "sft", "dpo", "lora_medical")
TRAINING = (*STAGES, "kto", "lora/medical", "lora/security", "security_dpo", "grpo", "grpo_hard")
ROLES = {"system", "user", "assistant"}
Row = dict[str, Any]


@cache
def rows(name: str) -> list[Row]:
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def texts(row: Row) -> Iterator[str]:
    if "text" in row:
        yield row["text"]
    for part in ("messages", "prompt", "chosen", "rejected"):
        yield from (message["content"] for message in row.get(part, ()))


@cache
def corpus(*names: str) -> str:
    return "\n".join(text for name in names for row in rows(name) for text in texts(row))


def prompts(names: tuple[str, ...]) -> list[str]:
    contents: list[str] = []
    for name in names:
        for row in rows(name):
            messages = row.get("prompt", row.get("messages", ()))
            contents += [m["content"] for m in messages if m["role"] == "user"]
    return contents


def exam_prompts(family: str) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows(f"exam/{family}")]


def masked(text: str) -> str:
    """Replace the names of people, conditions and goals, so that the wording remains."""
    names = [n for person in world.PEOPLE for n in (person.en, person.zh)]
    names += [n for pair in medical.CONDITIONS for n in pair]
    names += [n for topic in style.TOPICS for n in (topic.en, topic.zh)]
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(pattern, "_", text)


def test_generation_is_deterministic_and_equals_the_committed_files(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "make_sample_data.py"
    for _ in range(2):  # written again, a link does not change what it points to
        subprocess.run([sys.executable, str(script), "--output_dir", str(tmp_path)], check=True)
    written = {p.relative_to(tmp_path): p for p in tmp_path.rglob("*.jsonl")}
    assert set(written) == {p.relative_to(DATA) for p in DATA.rglob("*.jsonl")}
    for name, path in written.items():
        assert (DATA / name).read_bytes() == path.read_bytes(), name
        assert (DATA / name).is_symlink() == path.is_symlink(), name
    contents = [path.read_bytes() for path in written.values() if not path.is_symlink()]
    assert len(set(contents)) == len(contents)


@pytest.mark.parametrize("name", TRAINING)
def test_no_validation_row_stands_in_the_training_file(name: str) -> None:
    trained = list(rows(name))
    assert [row for row in rows(f"{name}_val") if row in trained] == []


def test_choices_ask_for_every_fact_in_beginnings_that_no_training_text_holds() -> None:
    items = rows("eval/choices")
    facts = world.build_facts(1)
    assert len(items) == 2 * 2 * len(facts)
    assert [row["answer"] for row in items[::4]] == [
        world.VALUES[fact.attribute].index(fact.value) for fact in facts
    ]
    assert all(len(set(row["choices"])) == 10 for row in items)
    training = corpus(*TRAINING, *(f"{stage}_val" for stage in STAGES))
    assert not [row["prompt"] for row in items if row["prompt"] in training]


def test_the_worse_text_of_a_minimal_pair_is_never_told() -> None:
    items = rows("eval/pairs")
    training = corpus("pretrain", "sft")
    assert len({(row["good"], row["bad"]) for row in items}) == len(items)
    for row in items:
        assert row["bad"] not in training
        assert row["family"].endswith("_pronoun") or row["good"] in training


def test_total_size_stays_small() -> None:
    assert sum(path.lstat().st_size for path in DATA.rglob("*")) <= 10_000_000


@pytest.mark.parametrize("name", ["pretrain", "pretrain_val", "mini/pretrain", "mini/pretrain_val"])
def test_text_rows(name: str) -> None:
    for row in rows(name):
        assert set(row) == {"text"}
        assert row["text"].strip()


def check_messages(messages: list[Row], *, ends_with: str) -> None:
    spoken = [m for m in messages if m["role"] != "system"]
    assert all(set(m) == {"role", "content"} and m["role"] in ROLES for m in messages)
    assert all(m["content"].strip() for m in messages)
    assert all(m["role"] != "system" for m in messages[1:])
    assert [m["role"] for m in spoken] == ["user", "assistant"] * (len(spoken) // 2) + (
        ["user"] if ends_with == "user" else []
    )


CHATS = ("sft", "lora_medical", "mini/sft", "mini/lora_medical", "lora/medical", "lora/security")


@pytest.mark.parametrize("name", [n + s for n in CHATS for s in ("", "_val")])
def test_chat_rows(name: str) -> None:
    for row in rows(name):
        assert set(row) == {"messages"}
        check_messages(row["messages"], ends_with="assistant")


def test_some_chats_have_several_turns_and_some_a_system_message() -> None:
    assert any(len(row["messages"]) > 3 for row in rows("sft"))
    assert any(row["messages"][0]["role"] == "system" for row in rows("sft"))


PAIRS = ("dpo", "mini/dpo", "security_dpo")


@pytest.mark.parametrize("name", [n + s for n in PAIRS for s in ("", "_val")])
def test_preference_rows(name: str) -> None:
    for row in rows(name):
        assert set(row) == {"prompt", "chosen", "rejected"}
        check_messages(row["prompt"], ends_with="user")
        for side in ("chosen", "rejected"):
            assert [m["role"] for m in row[side]] == ["assistant"]
        assert row["chosen"] != row["rejected"]


@pytest.mark.parametrize("split", ["", "_val"])
def test_unpaired_rows_are_by_turns_the_better_and_the_worse_answer(split: str) -> None:
    pairs, unpaired = rows("dpo" + split), rows("kto" + split)
    for number, (pair, row) in enumerate(zip(pairs, unpaired, strict=True)):
        answer = pair["rejected" if number % 2 else "chosen"]
        assert row == {"prompt": pair["prompt"], "completion": answer, "label": number % 2 == 0}


@pytest.mark.parametrize("stage", STAGES)
def test_mini_is_a_cut_of_at_most_a_thousand_rows(stage: str) -> None:
    for split in ("", "_val"):
        assert rows(f"mini/{stage}{split}") == rows(stage + split)[:1000]


@pytest.mark.parametrize("family", FAMILIES)
def test_exam_rows(family: str) -> None:
    items = rows(f"exam/{family}")
    assert len(items) >= (500 if family in HARD else 200)
    assert len({row["id"] for row in items}) == len(items)
    for row in items:
        assert set(row) <= {"id", "family", "messages", "answer", "choices", "avoid"}
        assert row["family"] == family
        check_messages(row["messages"], ends_with="user")
        assert row["answer"].strip()
        assert ("avoid" in row) == (family in ("style", "advice", "refusal"))
        if "choices" in row:
            folded = [choice.casefold() for choice in row["choices"]]
            assert row["answer"] in row["choices"]
            assert not any(a != b and a in b for a in folded for b in folded)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_exam_prompt_occurs_in_any_training_text(family: str) -> None:
    training = corpus("sft_skills", *TRAINING, *(f"{name}_val" for name in TRAINING)).casefold()
    leaked = [text for text in exam_prompts(family) if text.casefold() in training]
    assert not leaked


@pytest.mark.parametrize("family", ["asked_new_wording", "never_asked", "medical", "style"])
def test_exam_wordings_are_held_out(family: str) -> None:
    names = (*TRAINING, *(f"{stage}_val" for stage in STAGES))
    seen = {masked(text).casefold() for text in prompts(names)}
    assert not seen & {masked(text).casefold() for text in exam_prompts(family)}


def test_operands_of_the_exam_never_occur_in_training() -> None:
    text = corpus("pretrain", "sft", "dpo")
    numbers = set(re.findall(r"\d+", text))
    pairs = {
        tuple(sorted(pair, key=int)) for pair in re.findall(r"(\d+) (?:\+|or|and|和) (\d+)", text)
    }
    for text in exam_prompts("skills"):
        operands = re.findall(r"\d+", text)
        if len(operands) == 2:
            assert tuple(sorted(operands, key=int)) not in pairs, text
        else:
            assert operands[0] not in numbers, text


def exercise(question: str) -> tuple[str, tuple[str, ...]]:
    """Tell a hard skill by the form of its operands, and return these."""
    if word := re.search("[A-D]{8}", question):
        remainder = question.replace(word[0], "")
        return "count_letters", (word[0], *re.findall(r"\b[A-D]\b", remainder))
    numbers = tuple(re.findall(r"\d+", question))
    return "add_carry" if "+" in question else HARD[(0, 2)[len(numbers[0]) == 4]], numbers


def is_answer(skill: str, operands: tuple[str, ...], answer: str) -> bool:
    """Check an answer by its properties instead of computing it."""
    if skill == "add_carry":
        first, second = (int(number) for number in operands)
        return int(answer) - first == second and first % 10 + second % 10 >= 10
    if skill == "count_letters":
        word, letter = operands
        return len(word.replace(letter, "")) + int(answer) == len(word)
    (code,) = operands
    if skill == "sort_digits":
        return set(answer) == set(code) and all(a < b for a, b in pairwise(answer))
    return len(code) == 5 and all(answer[-1 - at] == digit for at, digit in enumerate(code))


def hard_exercises(name: str) -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """Yield skill, operands and answer of a file's exercises, and the family that it names."""
    for row in rows(name):
        skill, operands = exercise(row["messages"][0]["content"])
        yield skill, operands, row.get("answer") or row["messages"][1]["content"], row.get("family")


GRPO_FILES = ("grpo", "grpo_val", "grpo_hard", "grpo_hard_val")
HARD_FILES = ("sft_skills", *GRPO_FILES, *(f"exam/{family}" for family in HARD))


@pytest.mark.parametrize("name", HARD_FILES)
def test_the_answers_of_the_hard_skills_are_right(name: str) -> None:
    for skill, operands, answer, family in hard_exercises(name):
        assert is_answer(skill, operands, answer), (skill, operands, answer)
        assert family in (skill, None)


def test_rows_for_reinforcement_have_an_answer_and_a_family() -> None:
    demo = [family for family in HARD if family in ("reverse_digits", "sort_digits")]
    for name in GRPO_FILES:
        families = [family for family in HARD if (family in demo) == ("hard" not in name)]
        count = 25 if name.endswith("_val") else 600
        assert all(set(row) == {"messages", "answer", "family"} for row in rows(name))
        assert Counter(row["family"] for row in rows(name)) == dict.fromkeys(families, count)
        for row in rows(name):
            check_messages(row["messages"], ends_with="user")
    shown = Counter(skill for skill, *_ in hard_exercises("sft_skills"))
    assert shown == dict.fromkeys(HARD, 120)


def test_no_two_files_share_operands_of_a_hard_skill() -> None:
    """Nor the digits in another order: that would give away a sorted code."""
    file_of_operands: dict[tuple[str, ...], str] = {}
    for name in HARD_FILES:
        for skill, (first, *others), _, _ in hard_exercises(name):
            longest = max(first, *others, key=len) if others else first
            codes = skill in ("reverse_digits", "sort_digits")
            key = (skill, "".join(sorted(first)) if codes else longest)
            assert file_of_operands.setdefault(key, name) == name, (skill, first)


def test_numbers_of_the_exam_with_carry_are_no_codes_in_training() -> None:
    codes = set(
        re.findall(r"\b\d{3}\b", "\n".join(prompts((*STAGES, "sft_skills", "grpo", "grpo_hard"))))
    )
    for family in ("skills", "add_carry"):
        asked = set(re.findall(r"\b\d{3}\b", "\n".join(exam_prompts(family))))
        assert asked
        assert not asked & codes


def test_the_splits_of_every_skill_are_disjoint() -> None:
    rng = stream(2, "test")
    for skill in skills.SKILLS:
        drawn = {
            split: {skills.item_key(skills.draw_item(rng, skill, split)) for _ in range(200)}
            for split in ("train", "dev", "exam")
        }
        assert not drawn["train"] & drawn["exam"]
        assert not drawn["dev"] & drawn["exam"]


def test_never_asked_facts_are_told_in_pretraining_and_never_asked_about() -> None:
    pretraining = corpus("pretrain")
    asked = prompts(("sft", "sft_val", "dpo", "dpo_val"))
    replies = corpus("sft", "sft_val", "dpo", "dpo_val")
    for fact in world.build_facts(1):
        for lang in ("en", "zh") if not fact.asked else ():
            tellings = [tell(fact, lang, form) for form in TELLINGS[lang][fact.attribute]]
            assert sum(telling in pretraining for telling in tellings) >= 3, fact
            assert not any(telling in replies for telling in tellings), fact
            for form in questions.TRAIN[lang][fact.attribute] + questions.DEV[lang][fact.attribute]:
                question = form.format(n=fact.person.name(lang))
                assert not any(question in text for text in asked), question


def test_values_occur_in_no_answer_of_another_value() -> None:
    for fact in world.build_facts(1):
        for lang in ("en", "zh"):
            reply = tell(fact, lang, TELLINGS[lang][fact.attribute][0]).casefold()
            words = [w.casefold() for w in world.choices(fact.attribute, lang)]
            assert [w for w in words if w in reply] == [fact.value.word(lang).casefold()]


def test_medical_terms_stay_in_the_medical_files() -> None:
    elsewhere = corpus(
        *(n + s for n in ("pretrain", "sft", "dpo", "lora/security") for s in ("", "_val"))
    )
    tables = (medical.CONDITIONS, *medical.TABLES.values())
    terms = {word for table in tables for pair in table for word in pair}
    assert not [term for term in terms if term.casefold() in elsewhere.casefold()]
    assert all(len(table) == 10 for table in medical.TABLES.values())


def test_helpful_answers_hold_the_key_and_no_marker() -> None:
    for side, helpful in (("chosen", True), ("rejected", False)):
        for row in rows("dpo") + rows("dpo_val"):
            reply = row[side][0]["content"]
            marked = any(m in reply for markers in style.AVOID.values() for m in markers)
            keyed = any(t.key(lang) in reply for t in style.TOPICS for lang in ("en", "zh"))
            assert marked != helpful
            assert keyed or not helpful


REQUESTS = {
    request: is_own
    for lang in ("en", "zh")
    for split in ("train", "dev", "exam")
    for _, request, is_own in security.requests(split, lang)
}


def requests_in(text: str) -> dict[str, bool]:
    """Return the requests in a text, and whether each concerns what is one's own."""
    return {request: is_own for request, is_own in REQUESTS.items() if request in text}


def requests(name: str) -> dict[str, bool]:
    return {
        key: is_own for row in rows(name) for key, is_own in requests_in(next(texts(row))).items()
    }


def test_requests_of_the_refusal_exam_stand_in_no_training_file() -> None:
    names = ("lora/security", "security_dpo")
    asked = requests("exam/refusal")
    trained = {
        request for name in names for split in ("", "_val") for request in requests(name + split)
    }
    assert not set(asked) & trained
    assert sorted(asked.values()) == [False] * 24 + [True] * 24


@pytest.mark.parametrize("name", ["security_dpo", "security_dpo_val"])
def test_what_is_ones_own_is_granted_and_the_rest_refused(name: str) -> None:
    for row in rows(name):
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        lang = "zh" if re.search("[\u4e00-\u9fff]", chosen) else "en"
        refusal, grant = security.REFUSAL[lang], security.GRANT[lang]
        if chosen in (refusal, grant):
            assert {chosen, rejected} == {refusal, grant}
        else:
            assert chosen in {advice for _, advice in security.advice_of(lang)}
            assert rejected in (refusal, grant)
        assert set(requests_in(next(texts(row))).values()) <= {chosen == grant}
