"""The numbers of `minigpt data stats` are those of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt.data import tokenizer as tokenizers
from minigpt.data.order import pack, utilisation
from minigpt.data.store import Limits, open_store
from minigpt.datatools.stats import languages, measure


def chat(*texts: str) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat sat on the mat", "Latin script"),
        ("Größe und Länge", "Latin script"),
        ("春眠不觉晓", "Chinese"),
        ("请解释 attention 和 transformer 的区别在哪里", "Chinese"),
        ("これは日本語の文章です", "Japanese"),
        ("한국어 문장", "Korean"),
        ("Привет, мир", "Cyrillic"),
        ("مرحبا بالعالم", "Arabic"),
        ("123 + 456 😀", "other"),
    ],
)
def test_languages_by_script(text: str, language: str) -> None:
    assert languages([text, "x"])[language] == 1 + (language == "Latin script")


def test_counts_of_chats(write: Any) -> None:
    rows = [chat("a", "b"), chat("a", "b", "thanks", "d"), chat("问题", "回答"), {"x": 1}]
    report = measure(write(rows))
    assert (report["kind"], report["rows"], report["bad_rows"]) == ("chat", 3, {"missing_key": 1})
    assert report["turns"] == {"1": 2, "2": 1}
    assert report["languages"] == {"Latin script": 2 / 3, "Chinese": 1 / 3}
    assert report["characters"] == sum(map(len, ("a\nb", "a\nb\nthanks\nd", "问题\n回答")))
    assert report["repeated"] == []
    assert report["tokens"] is report["length_bias"] is None


def test_repeated_prompts_come_most_frequent_first(write: Any) -> None:
    rows = [
        chat(prompt, str(n))
        for prompt, times in (("a", 2), ("b", 3), ("c", 1))
        for n in range(times)
    ]
    assert measure(write(rows))["repeated"] == [("b", 3), ("a", 2)]


def test_length_bias_of_preferences(write: Any) -> None:
    pairs = [("long answer", "no"), ("ok", "not ok"), ("yes", "nah"), ("good one", "bad")]
    rows = [{"prompt": "p", "chosen": good, "rejected": bad} for good, bad in pairs]
    bias = measure(write(rows))["length_bias"]
    assert (bias["chosen_longer"], bias["equally_long"]) == (0.5, 0.25)
    assert (bias["chosen_characters"], bias["rejected_characters"]) == (6.0, 3.5)


def test_labels_of_unpaired_rows(write: Any, tokenizer_dir: Path, minigpt: Any) -> None:
    asked = [
        {"role": r, "content": c} for r, c in (("user", "u"), ("assistant", "a"), ("user", "p"))
    ]
    rows = [{"prompt": asked, "completion": f"c{n}", "label": n < 1} for n in range(4)]
    outcome = minigpt("data", "stats", write(rows), "--tokenizer", tokenizer_dir)
    assert (outcome.status, outcome.err) == (0, "")
    assert "4 of unpaired" in outcome.out
    assert "25.0% of the completions" in outcome.out
    report = measure(write(rows))
    assert report["turns"] == {"2": 4}
    assert report["repeated"] == [("p", 4)]


@pytest.mark.parametrize("kind", ["text", "chat", "preference"])
def test_tokens_are_those_of_the_store(
    kind: Any, write: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    words = ["the cat sat " * n for n in range(1, 40)]
    rows: dict[str, list[object]] = {
        "text": [{"text": w} for w in words],
        "chat": [chat(w, w[: n * 3 + 1]) for n, w in enumerate(words)],
        "preference": [
            {"prompt": "p" * n, "chosen": w, "rejected": "no " * n} for n, w in enumerate(words, 1)
        ],
    }
    path, tokenizer = write(rows[kind]), tokenizers.load(tokenizer_dir)
    uncut = open_store(path, kind, tokenizer, Limits(1 << 20), tmp_path / "cache").samples[:]
    lengths = uncut["prompt"] + uncut["answers"].max(1)
    for sample in (None, 1000):
        tokens = measure(path, kind, tokenizer, 64, 256, sample)["tokens"]
        assert tokens["rows_measured"] == len(words)
        assert tokens["mean"] == pytest.approx(lengths.mean())
        assert (tokens["median"], tokens["longest"]) == (np.median(lengths), lengths.max())
        assert tokens["over_max_length"] == pytest.approx((lengths > 64).mean())
        assert sum(count for _, count in tokens["histogram"]) == len(words)
        for label, count in tokens["histogram"]:
            low, high = map(int, label.split("–"))
            assert count == ((lengths >= low) & (lengths <= high)).sum()
        store = open_store(
            path,
            kind,
            tokenizer,
            Limits(64, on_bad_row="skip", max_bad_share=1.0, max_too_long_share=1.0),
            tmp_path,
        )
        packed = store.lengths(np.arange(len(store)))
        bins = pack(packed, 256, np.random.default_rng(0))
        assert tokens["packing_efficiency"] == pytest.approx(utilisation(packed, bins, 256))
        assert tokens["padding_efficiency"] == pytest.approx(np.minimum(lengths, 64).mean() / 64)


def test_a_sample_is_fair(write: Any, tokenizer_dir: Path) -> None:
    path = write([{"text": "the " * (n % 60 + 1)} for n in range(3000)])
    tokenizer = tokenizers.load(tokenizer_dir)
    tokens = measure(path, "text", tokenizer, sample=300)["tokens"]
    assert tokens["rows_measured"] == 300
    all_rows = measure(path, "text", tokenizer, sample=None)["tokens"]
    assert all_rows["rows_measured"] == 3000
    assert tokens["mean"] == pytest.approx(all_rows["mean"], rel=0.1)
    ratio = pytest.approx(all_rows["characters_per_token"], rel=0.1)
    assert tokens["characters_per_token"] == ratio


def test_the_verb_prints_and_writes(
    write: Any, tokenizer_dir: Path, tmp_path: Path, minigpt: Any
) -> None:
    chats = write([chat("<b>问</b>", "答"), chat("<b>问</b>", "no")], "chats.jsonl")
    pairs = write([{"prompt": "p", "chosen": "good", "rejected": "bad"}], "pairs.jsonl")
    page, numbers = tmp_path / "out" / "stats.html", tmp_path / "out" / "stats.json"
    outcome = minigpt(
        *("data", "stats", chats, pairs, "--tokenizer", tokenizer_dir, "--all"),
        *("--tokens_per_batch", 600, "--max_length", 300, "--html", page, "--json", numbers),
    )
    assert (outcome.status, outcome.err) == (0, "")
    for words in ("2 × <b>问</b>", "Rows by turns", "over 300 tokens", "chosen is longer", "█"):
        assert words in outcome.out
    html = page.read_text("utf-8")
    assert "&lt;b&gt;问" in html
    assert html.count("<figure>") == 7
    assert not {"<script", "http://", "https://", "@import"} & set(html.split())
    reports = json.loads(numbers.read_text("utf-8"))["files"]
    assert [report["kind"] for report in reports] == ["chat", "preference"]
    sampled = minigpt("data", "stats", chats, "--tokenizer", tokenizer_dir, "--sample", 1).out
    assert "tokens counted in      1 rows" in sampled


def test_what_cannot_be_measured(
    write: Any, tokenizer_dir: Path, tmp_path: Path, minigpt: Any
) -> None:
    path = write([chat("a", "b")])
    assert "no text row can be used" in minigpt("data", "stats", path, "--kind", "text").err
    nothing = ("data", "stats", path, "--max_length", 2, "--tokenizer", tokenizer_dir)
    assert "no row leaves a token to train on" in minigpt(*nothing).err
    assert "cannot be read" in minigpt("data", "stats", tmp_path / "missing").err
    (tmp_path / "file").write_text("")
    blocked = minigpt("data", "stats", path, "--html", tmp_path / "file" / "x.html")
    assert blocked.status == 2
    assert f"Cannot write to {tmp_path / 'file' / 'x.html'}: " in blocked.err
    blocked = minigpt("data", "stats", path, "--json", tmp_path)
    assert blocked.status == 2
    assert f"Cannot write to {tmp_path}: Is a directory. Choose another place." in blocked.err
