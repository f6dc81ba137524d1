"""What docs/results.md measures, and the script that runs the arms."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from minigpt.reading import read_yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), str(SCRIPTS / "bench"), *sys.path])
    return importlib.import_module


@pytest.fixture
def verse(load: Any) -> Any:
    return load("measures.verse")


@pytest.fixture
def formats(load: Any) -> Any:
    return load("measures.formats")


@pytest.fixture
def results(load: Any) -> Any:
    return load("results")


QUATRAIN = "白日依山盡，黃河入海流。欲窮千里目，更上一層樓。"


def test_lines_are_what_stands_between_marks(verse: Any) -> None:
    assert verse.lines(QUATRAIN) == ["白日依山盡", "黃河入海流", "欲窮千里目", "更上一層樓"]
    assert verse.lines("") == verse.lines("，。abc\n") == []


@pytest.mark.parametrize(
    ("poem", "regular"),
    [
        (QUATRAIN, True),
        (QUATRAIN * 2, True),
        (QUATRAIN + "白日依山盡。", False),
        ("白日依山盡，黃河入海流。", False),
        ("白日山盡，黃河海流。欲窮里目，更上層樓。", False),
        (QUATRAIN.replace("更上", "上"), False),
        ("", False),
    ],
)
def test_regular_verse(verse: Any, poem: str, regular: bool) -> None:
    assert verse.is_regular(verse.lines(poem)) is regular


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("流", "樓", True),  # 尤
        ("光", "霜", True),  # 陽
        ("东", "風", True),  # 東, in simplified and traditional characters
        ("花", "家", True),
        ("斜", "家", True),  # which do not rhyme any more
        ("流", "光", False),
        ("山", "心", False),
        ("去", "魚", False),  # of another tone
        ("流", "x", None),
        ("", "樓", None),
    ],
)
def test_rhymes(verse: Any, one: str, other: str, expected: bool | None) -> None:
    assert verse.rhyme(one, other) is expected


def test_shares_of_poems(verse: Any) -> None:
    unrhymed = QUATRAIN.replace("樓", "山")
    unknown = QUATRAIN.replace("樓", "\u3fff")
    counted = verse.measure([QUATRAIN, unrhymed, unknown, "白日"])
    assert counted == verse.Verse(poems=4, regular=3, judged=2, rhymed=1)
    shares = counted.shares()
    assert shares["regular"] == 0.75
    assert shares["rhymed of regular"] == 0.5
    assert shares["regular and rhymed"] == 0.25
    assert shares["judged of regular"] == pytest.approx(2 / 3)
    assert set(verse.measure([]).shares().values()) == {0.0}


def test_the_table_of_finals(verse: Any) -> None:
    table = verse.groups()
    assert len(table) > 4500
    assert len({name for names in table.values() for name in names}) == 28
    assert max(map(len, table.values())) <= 4


CASES = {
    "JSON": (['{"answer": "eggs"}', '```json\n{"a": [1]}\n```'], ["{answer: eggs}", "[1]", "eggs"]),
    "three lines": (["a\nb\nc", "a\n\nb\nc\n"], ["a b c", "a\nb", "a\nb\nc\nd", ""]),
    "list of three": (["- a\n- b\n- c"], ["- a\n- b", "a\n- b\n- c", "* a\n* b\n* c", ""]),
    "one word": (["Eggs.", "well-known"], ["Two words", "", "..."]),
    "one sentence": (["Eggs are good.", "Why not?"], ["A. B.", "Eggs", "A\nb.", ""]),
    "capitals": (["EGGS, 2."], ["Eggs", "2", ""]),
    "first word": (["Well, eggs."], ["Eggs. Well,", "Well,", "well, eggs"]),
    "last word": (["Eggs. Done.", "Eggs.\nDone.\n"], ["Done. Eggs.", "Done.", "done"]),
}


def test_forms_are_checked(formats: Any) -> None:
    assert CASES.keys() == formats.FORMS.keys()
    for name, (good, bad) in CASES.items():
        check = formats.FORMS[name].check
        assert [check(reply) for reply in good] == [True] * len(good), name
        assert [check(reply) for reply in bad] == [False] * len(bad), name


def test_questions_and_wordings_of_the_test_are_its_own(formats: Any) -> None:
    asked = formats.pair_prompts()
    test = formats.test_prompts()
    assert len({prompt.text for prompt in asked}) == len(asked) == 40 * 8 * 2
    assert len({prompt.text for prompt in test}) == len(test) == 64
    assert not set(formats.QUESTIONS) & set(formats.TEST_QUESTIONS)
    for form in formats.FORMS.values():
        assert form.test not in form.wordings
    held_out = {p.text for p in asked if p.held_out}
    assert len(held_out) == 8 * 8 * 2
    assert not any(
        p.text.startswith(q)
        for p in asked
        if not p.held_out
        for q in formats.QUESTIONS[-formats.HELD_OUT :]
    )


def test_pairs_of_better_and_worse_answers(formats: Any) -> None:
    prompt = formats.Prompt("one word", "Which? Use a single word.")
    replies = ["an egg", "Egg", "", "Egg ", "two eggs", "Milk", "some milk"]
    pairs = formats.pairs(prompt, replies)
    assert pairs == [
        {"prompt": prompt.text, "chosen": "Egg", "rejected": "an egg"},
        {"prompt": prompt.text, "chosen": "Milk", "rejected": "two eggs"},
    ]
    assert formats.pairs(prompt, replies, limit=1) == pairs[:1]
    assert formats.pairs(prompt, ["Egg", "Milk"]) == []


def test_replies_are_rewarded_that_have_the_form_and_end(formats: Any) -> None:
    replies = ["yes", "yes and no", "yes", '{"a": 1}']
    rewards = formats.obeys(
        completions=[[{"role": "assistant", "content": reply}] for reply in replies],
        completion_ids=[[1, 2], [1, 2], [1] * formats.LONGEST_REPLY, [1]],
        form=["one word", "one word", "one word", "JSON"],
        prompts=[],
    )
    assert rewards == [1.0, 0.0, 0.0, 1.0]


def test_shares_of_followed_forms(formats: Any) -> None:
    prompts = [formats.Prompt(form, "") for form in ("JSON", "JSON", "capitals", "capitals")]
    shares = formats.following(prompts, ["{}", "x", "EGG", "A"])
    assert shares == {"all": 0.75, "JSON": 0.5, "capitals": 1.0}


def test_curves_poems_and_options(results: Any) -> None:
    rows = [
        {"step": 0, "time": 60.0, "val/loss": 9.0},
        {"step": 1, "time": 90.0, "train/loss": 8.0},
        {"step": 1, "time": 120.0, "val/loss": 7.0},
    ]
    assert results.curve(rows) == [(0.0, 9.0), (1.0, 7.0)]
    assert results.curve([]) == []
    assert results.split_poem("題\n人\n甲，乙。") == ("題\n人\n", "甲，乙。")
    base = {"a": {"b": 1, "c": 2}, "d": [1]}
    changed = results.merged(base, {"a": {"c": 3}, "d": [2], "e": None})
    assert changed == {"a": {"b": 1, "c": 3}, "d": [2], "e": None}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}


def options(tmp_path: Path, **changes: Any) -> Namespace:
    defaults: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "model": "m",
        "chats": "",
        "minutes": 1,
    }
    return Namespace(**{**defaults, **changes})


def test_a_run_that_was_cut_off_goes_on(
    results: Any, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def arm(name: str, fails: bool = False) -> Any:
        def run() -> dict[str, Any]:
            ran.append(name)
            if fails:
                raise KeyboardInterrupt
            return {"name": name}

        return run

    monkeypatch.setattr(load("measure"), "surroundings", dict)
    arms = results.Arms(options(tmp_path))
    arms.by_name = {"a": arm("a"), "b": arm("b", fails=True), "c": arm("c")}
    with pytest.raises(KeyboardInterrupt):
        arms.run(["c", "b", "a"])
    arms.by_name["b"] = arm("b")
    arms.run(["a", "b"])
    assert ran == ["a", "b", "b"]
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["name"] == "b"
    assert record.keys() >= {"arm_seconds", "machine"}
    assert not (tmp_path / "c.json").exists()


def test_each_stage_has_a_recipe(results: Any, tmp_path: Path) -> None:
    arms = results.Arms(options(tmp_path, recipes=str(ROOT / "configs" / "recipes")))
    modules = {
        stage: read_yaml(arms.recipe(stage))["model"]["class_path"] for stage in results.STAGES
    }
    assert modules == {
        "pretrain": "PretrainModule",
        "sft": "SFTModule",
        "lora": "LoRAModule",
        "dpo": "DPOModule",
        "grpo": "GRPOModule",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "x"], "--arms: there is no x"),
        (["--arms", "poems"], "--poems"),
        (["--arms", "sft", "--model", "m"], "--chats is needed"),
        (["--page", "--output_dir", "none"], "none has no records"),
    ],
)
def test_mistakes(results: Any, arguments: list[str], message: str, tmp_path: Path) -> None:
    from minigpt.errors import ConfigError

    with pytest.raises(ConfigError, match=message):
        results.main(arguments)


def test_chats_are_split_once(results: Any, tmp_path: Path) -> None:
    chats = tmp_path / "in.json"
    chats.write_text(json.dumps([{"instruction": str(i), "output": "x"} for i in range(21)]))
    arms = results.Arms(options(tmp_path / "out", chats=str(chats)))
    arms.directory.mkdir()
    train, val = arms.files("sft")
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in (train, val)]
    assert [len(part) for part in rows] == [18, 3]
    assert [row["instruction"] for row in rows[1]] == ["0", "10", "20"]
    chats.unlink()
    assert arms.files("sft") == (train, val)


MACHINE = {"date": "2026-01-01", "threads": 2, "processor": "cpu", "versions": {"torch": "2"}}
SHARES = {
    "poems": 200,
    "regular": 0.5,
    "rhymed of regular": 0.25,
    "regular and rhymed": 0.125,
    "judged of regular": 1.0,
}


def test_the_page(load: Any, tmp_path: Path) -> None:
    page = load("results_page")
    cost = {"minutes": 20.04, "steps": 1200, "tokens_seen": 123456, "peak_rss_mb": 900}
    cost |= {"useful_tokens_per_s": 1234.5, "curve": [[0.0, 2.0], [10.0, 1.0]]}
    common = {"machine": MACHINE, "arm_seconds": 1.0, "budget_minutes": 20.0}
    poems = {"bits_per_character": 6.5, "bits_per_character_per_nat": 2.0, "verse": SHARES}
    poems |= {"verse_held_out": SHARES, "poems": ["題\n人\n甲，乙。"] * 20}
    forms = {"all": 0.5, "JSON": 0.25}
    replies = [
        {"prompt": "Which? Reply in JSON.", "reply": ""},
        *[{"prompt": "Why?", "reply": "Because", "ended": True}] * 7,
        {"prompt": "How? Reply in three lines.", "reply": "By", "ended": False},
        *[{"prompt": "Why?", "reply": "Because", "ended": True}] * 7,
        {"prompt": "Who?", "reply": "I.", "ended": True},
    ]
    chat = {"held_out": 1.5, "following": forms, "replies": replies, "accuracy": 0.75}
    records = {
        "poems": cost | poems,
        "poems-plain": cost | poems,
        "pairs": {"answers": 400, "obeyed": 100, "pairs": 50, "held_out": 10},
        "base": chat,
        "sft": cost | chat,
        "dpo-plain": cost | chat,
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record | common))
    (tmp_path / "other.json").write_text("{}")
    page.write_page(tmp_path, tmp_path / "results.md", "Other work ran beside.")
    text = (tmp_path / "results.md").read_text()
    assert "| bits per character | 6.5 | 6.5 |  |" in text
    assert "| recipe | 4.000 (0.0) | 2.000 (10.0) |" in text
    assert text.count("甲，乙。") == 25
    assert "| before |  |  |  |  |  | 1.500 | 50% | 75% |" in text
    assert "| SFT | 20 | 1,200 | 123,456 | 1,234 | 900 | 1.500 | 50% | 75% |" in text
    assert "| JSON | 25% | 25% | 25% |" in text
    assert "400 answers" in text
    assert " Other work ran beside.\n" in text
    assert " \\\n  --minutes 20 \\\n  --poems_minutes 20\n" in text
    assert "[SFT] (did not end)" in text
    assert "[SFT] By (did not end)" in text
    assert "[SFT] I.\n" in text
    assert "[DPO, plain]" not in text


def test_the_page_says_what_grpo_brought(load: Any) -> None:
    ends = [{"val/accuracy": a, "val/pass_at_8": p} for a, p in ((0.14, 0.24), (0.2, 0.35))]
    text = load("results_page").grpo_text({"before": ends[0], "final": ends[1]})
    assert "14% before and 20% after have the form in greedy answers" in text
    assert "24% before and 35% after in one of 8" in text
