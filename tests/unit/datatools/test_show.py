"""What is shown as trained on is what the loss is computed on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt.data import tokenizer as tokenizers
from minigpt.data.batch import collate
from minigpt.data.store import Limits, open_store
from minigpt.datatools.show import coloured, html, plain, segments
from minigpt.datatools.stats import measure

CHATS = [
    {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]}
    for roles, texts in (
        (("user", "assistant"), ("你好<b>", "您好！👩‍👧")),
        (
            ("system", "user", "assistant", "user", "assistant"),
            ("Be kind.", "hi", "yo", "bye", "see you " * 30),
        ),
    )
]
ROWS: dict[str, list[Any]] = {
    "text": [{"text": "春眠不觉晓\nthe cat"}, {"text": "the cat sat " * 40}],
    "chat": CHATS,
    "preference": [{"prompt": "问？", "chosen": "好答案 " * 20, "rejected": "坏"}],
}


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


def test_another_chat_template(
    write: Any, tokenizer_dir: Path, tmp_path: Path, minigpt: Any
) -> None:
    file, path = tmp_path / "colon.jinja", write(CHATS[:1])
    file.write_text(TEMPLATE)
    options = (path, "--tokenizer", tokenizer_dir, "--chat_template")
    shown = minigpt("data", "show", *options, file).out
    assert "user: 你好<b>" in shown
    assert "user\\n" not in shown
    tokens = int(re.findall(r"(\d+) tokens", shown)[0])
    report = tmp_path / "stats.json"
    assert minigpt("data", "stats", *options, file, "--json", report).status == 0
    assert json.loads(report.read_text())["files"][0]["tokens"]["longest"] == tokens
    long = minigpt("data", "check", *options, file, "--max_length", 3)
    assert "1 row checked" in long.out
    assert "colon is neither a file" in minigpt("data", "check", *options, "colon").err
    without = minigpt("data", "check", path, "--chat_template", file)
    assert "--chat_template needs --tokenizer" in without.err


@pytest.mark.parametrize("kind", list(ROWS))
def test_targets_are_those_of_the_batch(
    kind: Any, write: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    path, tokenizer = write(ROWS[kind]), tokenizers.load(tokenizer_dir)
    store = open_store(path, kind, tokenizer, Limits(64), tmp_path / "cache")
    samples = [store.sample(i) for i in range(len(store))]
    batch = collate(samples)
    parts = list(segments(path, tokenizer, None, 64, rows=10))
    counts = [list(map(int, re.findall(r"(\d+) t", part.heading))) for part in parts]
    assert sum(tokens for tokens, _ in counts) == batch.n_tokens
    assert sum(targets for _, targets in counts) == len(batch.labels)
    borders = np.cumsum([0, *(tokens for tokens, _ in counts)])
    assert {0, *np.cumsum([len(sample.ids) for sample in samples])} <= set(borders.tolist())
    decode = tokenizer.backend_tokenizer.decode
    shown = "".join(text for part in parts for text, _ in part.tokens)
    pieces = np.split(np.concatenate([sample.ids for sample in samples]), borders[1:-1])
    assert shown == "".join(decode(ids.tolist(), skip_special_tokens=False) for ids in pieces)


def test_an_answer_that_is_only_read_is_shown_so(write: Any, tokenizer_dir: Path) -> None:
    roles, texts = ("user", "assistant") * 2, ("hi", "WRONG", "no", "right")
    row: Any = {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}
    row["messages"][1]["train"] = False
    path = write([row])
    part = next(segments(path, tokenizers.load(tokenizer_dir)))
    assert re.findall("⟦(.*?)⟧", plain(part)) == ["right<|im_end|>"]
    assert "assistant\nWRONG<|im_end|>" in plain(part)
    report = measure(path, tokenizer=tokenizers.load(tokenizer_dir))
    assert report["turns"] == {"2": 1}
    assert report["tokens"]["mean"] == len(part.tokens)


def test_a_margin_stands_beside_the_better_answer(write: Any, tokenizer_dir: Path) -> None:
    path = write([{**ROWS["preference"][0], "margin": 0.5}])
    parts = list(segments(path, tokenizers.load(tokenizer_dir)))
    names = [re.search(r" (\w+( \(.*\))?): ", part.heading) for part in parts]
    assert [name[1] for name in names if name] == ["prompt", "chosen (margin 0.5)", "rejected"]


def test_a_chat_without_colours(write: Any, tokenizer_dir: Path) -> None:
    part = next(segments(write(CHATS), tokenizers.load(tokenizer_dir)))
    assert plain(part) == (
        "<|im_start|>user\n你好<b><|im_end|>\n<|im_start|>assistant\n⟦您好！👩‍👧<|im_end|>⟧"
    )


def test_characters_are_whole_although_tokens_are_bytes(write: Any, tokenizer_dir: Path) -> None:
    part = next(segments(write(CHATS), tokenizers.load(tokenizer_dir)))
    assert not any("\ufffd" in text for text, _ in part.tokens)
    assert ("您", True) in part.tokens
    lines = coloured(part)
    marked = {lines.plain[s.start : s.end] for s in lines.spans if "on " in str(s.style)}
    assert {"您", "<|im_end|>"} <= marked
    assert "你" not in marked


def test_the_page_is_escaped_and_marks_targets(write: Any, tokenizer_dir: Path) -> None:
    page = html(list(segments(write(CHATS), tokenizers.load(tokenizer_dir))))
    assert "<b>" not in page
    assert "&lt;" in page
    assert '<span class="t">您</span>' in page or '<span class="t o">您</span>' in page
    assert '<span class="m">你</span>' in page or '<span class="m o">你</span>' in page


def test_the_verb(write: Any, tokenizer_dir: Path, tmp_path: Path, minigpt: Any) -> None:
    path, page = write(CHATS * 3), tmp_path / "show.html"
    options = ("data", "show", path, "--tokenizer", tokenizer_dir)
    outcome = minigpt(*options, "--start", 2, "--rows", 2, "--max_length", 40, "--html", page)
    assert (outcome.status, outcome.err) == (0, "")
    assert f"{path}:2: 40 tokens, " in outcome.out
    assert f"{path}:3: " in outcome.out
    assert f"{path}:4: " not in outcome.out
    assert page.read_text("utf-8").count("<figure>") == 2
    assert f"{path}:3:" in minigpt(*options).out  # three rows by default
    assert "There is no row from line 9" in minigpt(*options, "--start", 9).err
    assert "not a text row" in minigpt(*options, "--kind", "text").err
    assert "need --tokenizer" in minigpt("data", "show", path).err
    assert "no tokenizer at" in minigpt("data", "show", path, "--tokenizer", tmp_path).err


def test_rows_before_the_first_shown_may_be_bad(
    write: Any, tokenizer_dir: Path, minigpt: Any
) -> None:
    path = write([b"{", {"messages": []}, CHATS[0], b"{", CHATS[1]])
    options = ("data", "show", path, "--tokenizer", tokenizer_dir, "--start", 3)
    outcome = minigpt(*options, "--rows", 1)
    assert (outcome.status, outcome.err) == (0, "")
    assert f"{path}:3: " in outcome.out
    assert f"{path}:4: invalid JSON" in minigpt(*options).err


def test_escapes_of_rows_do_not_reach_the_terminal(
    write: Any, tokenizer_dir: Path, minigpt: Any
) -> None:
    commands = "a\x1b[2Jb\x9b1mc\u202ed\x07\x7f"
    file = write([{"text": commands}])
    shown = minigpt("data", "show", file, "--tokenizer", tokenizer_dir)
    checked = minigpt("data", "check", write([{commands: 1}], "bad.jsonl"))
    measured = minigpt("data", "stats", file)
    for outcome in (shown, checked, measured):
        assert not set("\x1b\x9b\u202e\x07\x7f") & set(outcome.out + outcome.err)
    assert "\\u001b[2J" in shown.out.replace("⟦", "").replace("⟧", "")


def test_an_unpaired_row_is_shown_with_its_label(write: Any, tokenizer_dir: Path) -> None:
    rows = [{"prompt": "问？", "completion": f"c{n}", "label": n > 0} for n in range(2)]
    parts = list(segments(write(rows), tokenizers.load(tokenizer_dir), start=2))
    assert [part.heading.split(":")[1] for part in parts] == ["2 prompt", "2 desirable"]
    assert [plain(part).count("⟦") for part in parts] == [0, 1]
    assert plain(parts[1]) == "⟦c1<|im_end|>⟧"
