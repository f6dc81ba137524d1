from __future__ import annotations

import copy
import errno
import gzip
import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import limit
from transformers import PreTrainedTokenizerFast

from minigpt.data import store as stores
from minigpt.data import tables
from minigpt.data import tokenizer as tokenizers
from minigpt.data.batch import collate
from minigpt.data.chat import ChatCodec
from minigpt.data.formats import BadRows, Kind, Message, Source, Text
from minigpt.data.store import Encoder, Limits, TokenStore, open_store, warn_of_rows
from minigpt.errors import ConfigError, DataError

TEXTS = ["the cat sat", "春眠不觉晓，处处闻啼鸟。", "42", "x" * 90]


def chat_row(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


def asked(question: str) -> list[Message]:
    return [Message("user", question)]


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


class Opener:
    """Writes rows and opens their store in the test's own cache."""

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.file, self.cache = directory / "rows.jsonl", directory / "cache"
        self.tokenizer = tokenizer

    def __call__(self, kind: Kind, rows: list[Any], **limits: Any) -> TokenStore:
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_store(self.file, kind, self.tokenizer, Limits(**limits), self.cache)

    def entries(self) -> list[str]:
        return sorted(os.listdir(self.cache)) if self.cache.exists() else []


@pytest.fixture
def opened(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Opener:
    return Opener(tmp_path, tokenizer)


def test_a_store_that_is_there_says_what_was_said_of_its_rows(
    opened: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "a", "completion": "b"} for _ in range(30)]
    rows[3]["tools"] = "some"
    rows[4] = {"prompt": "the cat " * 40, "completion": "b"}
    text = tmp_path / "a.txt"
    text.write_bytes("从前有一座山，山里有一座庙。\n".encode("gbk"))
    said = []
    for _ in range(2):  # as two processes would
        caplog.clear()
        warn_of_rows.cache_clear()
        tables.log_documents.cache_clear()
        with caplog.at_level("INFO"):
            opened("chat", rows, max_length=30)
            open_store(text, "text", opened.tokenizer, Limits(), opened.cache)
        messages = [record.getMessage() for record in caplog.records]
        said.append([message for message in messages if "samples, " not in message])
    assert said[0] == said[1]
    for part in ("left out, because", "tools, of which", "read as GB18030"):
        assert part in caplog.text
    assert f"{text}: a document is a line." in caplog.text


def runs(store: TokenStore) -> list[list[list[int]]]:
    """Prompt and both answers of each sample, of which the second may be empty."""
    samples = []
    for start, _, prompt, answers, *_ in store.samples[:].tolist():
        borders = start + np.cumsum([0, prompt, *answers])
        samples.append([store.tokens[a:b].tolist() for a, b in pairwise(borders)])
    return samples


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_texts_are_tokenised_as_they_are(
    opened: Opener, tokenizer: PreTrainedTokenizerFast
) -> None:
    store = opened("text", [{"text": t} for t in TEXTS])
    expected = [[*ids(tokenizer, t), 0] for t in TEXTS]  # 0 is <|endoftext|>
    assert runs(store) == [[[], row, []] for row in expected]
    assert store.lines().tolist() == [1, 2, 3, 4]
    assert store.lengths(np.array([2, 0])).tolist() == [len(expected[2]), len(expected[0])]
    assert (store.targets, store.tokens.dtype, len(store)) == (None, np.uint16, 4)
    tokens = sum(map(len, expected))
    counts = {"rows": 4, "samples": 4, "tokens": tokens, "targets": tokens - 4, "cut": 0}
    counts["highest_id"] = max(map(max, expected))
    assert store.meta == {"dtype": "uint16", **counts, "skipped": {}, "too_long": 0, "notes": []}


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=60), st.integers(2, 20))
def test_each_token_of_a_long_text_is_a_target_once(
    tokenizer: PreTrainedTokenizerFast, text: str, limit: int
) -> None:
    encoder = Encoder("text", tokenizer, Limits(limit))
    pairs = encoder.encode([(Text(text), Source(Path("a"), 1))], BadRows())
    samples = [sample.ids for sample, _ in pairs]
    assert all(2 <= len(sample) <= limit for sample in samples)
    assert all(a[-1] == b[0] for a, b in pairwise(samples))
    learnt = [token for sample in samples for token in sample[1:]]
    assert [samples[0][0], *learnt] == [*ids(tokenizer, text), 0]


def test_a_text_begins_as_the_tokenizer_begins_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    bos = tiny.with_bos(tokenizer)
    begun = Opener(tmp_path, bos)
    store = begun("text", [{"text": t} for t in TEXTS], max_length=20)
    start, end = bos.bos_token_id, tokenizers.document_end(bos)
    documents: dict[int, list[int]] = {}
    for line, (_, row, _) in zip(store.lines().tolist(), runs(store), strict=True):
        before = documents.setdefault(line, row[:1])
        assert before[-1] == row[0]
        before += row[1:]
    assert list(documents.values()) == [[start, *ids(bos, t), end] for t in TEXTS]
    assert store.meta["targets"] == sum(len(ids(bos, t)) + 1 for t in TEXTS)
    chats = begun("chat", [chat_row("u", "a")])
    assert start not in chats.tokens[:].tolist()  # a chat's comes from its template alone
    without = Opener(tmp_path, tokenizer)
    without("text", [{"text": t} for t in TEXTS], max_length=20)
    assert len(begun.entries()) == 3


def test_chats_hold_tokens_and_targets(opened: Opener, tokenizer: PreTrainedTokenizerFast) -> None:
    store = opened("chat", [chat_row("u", "a"), chat_row("u", "春\n", "v", "b")])
    codec = ChatCodec(tokenizer)
    first, second = (row[1] for row in runs(store))
    assert first == [*codec.encode_prompt(asked("u")), *ids(tokenizer, "a<|im_end|>")]
    assert store.targets is not None
    mask = store.targets[len(first) :].tolist()
    learnt = [token for token, target in zip(second, mask, strict=True) if target]
    assert tokenizer.decode(learnt) == "春\n<|im_end|>b<|im_end|>"
    assert store.meta["targets"] == 2 + len(learnt)
    assert [row[::2] for row in runs(store)] == [[[], []]] * 2


def test_an_answer_that_is_only_read_is_no_target(
    opened: Opener, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = ("u", "wrong", "v", "right", "w", "a")
    full = runs(opened("chat", [chat_row(*turns)]))[0][1]
    row = chat_row(*turns)
    row["messages"][1]["weight"] = 0
    row["messages"][5]["train"] = False
    store = opened("chat", [row])
    (sample,) = (row[1] for row in runs(store))
    assert sample == full[: len(sample)]  # with the wrong answer, and up to the right one's end
    assert store.targets is not None
    learnt = [token for token, target in zip(sample, store.targets[:], strict=True) if target]
    assert tokenizer.decode(learnt) == "right<|im_end|>"
    assert sample[-len(learnt) :] == learnt
    for turn in row["messages"]:
        turn["weight"] = 0
    with pytest.raises(DataError, match="no answer is to be learnt") as caught:
        opened("chat", [chat_row("u", "a"), row])
    assert (caught.value.reason, caught.value.line) == ("no_targets", 2)
    store = opened("chat", [chat_row("u", "a"), row], on_bad_row="skip", max_bad_share=0.5)
    assert (len(store), store.meta["skipped"]) == (1, {"no_targets": 1})


@pytest.mark.parametrize("answer_tokens", [0, 1, 2, 12, 13, 14])
def test_a_cut_chat_gets_no_false_end_of_turn(
    opened: Opener, tokenizer: PreTrainedTokenizerFast, answer_tokens: int
) -> None:
    rows = [chat_row("u", "x" * 12)]
    answer = len(ids(tokenizer, "x" * 12 + "<|im_end|>"))
    full = runs(opened("chat", rows))[0][1]
    start = len(ChatCodec(tokenizer).encode_prompt(asked("u")))
    assert len(full) == start + answer
    limit = start + answer_tokens
    if not answer_tokens:
        with pytest.raises(DataError, match="no target token is left") as caught:
            opened("chat", rows, max_length=limit)
        assert (caught.value.reason, caught.value.line) == ("too_many_too_long", 1)
        return
    store = opened("chat", rows, max_length=limit)
    assert runs(store)[0][1] == full[:limit]
    assert store.targets is not None
    assert np.flatnonzero(store.targets[:]).tolist() == list(range(start, min(limit, len(full))))
    assert store.meta["cut"] == int(answer_tokens < answer)


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_rows_of_which_the_cut_leaves_nothing_are_left_out_and_counted(
    opened: Opener, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    rows = [chat_row("x" * 99, "a"), *[chat_row("u", "a")] * 19]
    limits = {"max_length": 40, "on_bad_row": policy}
    store = opened("chat", rows, **limits)
    assert store.lines().tolist() == list(range(2, 21))
    assert (store.meta["too_long"], store.meta["skipped"]) == (1, {})
    assert "no target token is left after cutting to 40: 1 of 20 rows, the first in" in caplog.text
    with pytest.raises(
        DataError, match=r"1 of 20 rows, more than 4.0%. Raise max_length"
    ) as caught:
        opened("chat", rows, **limits, max_too_long_share=0.04)
    assert (caught.value.reason, caught.value.line) == ("too_many_too_long", 1)
    with pytest.raises(DataError, match="none of the 1 rows leaves a token"):
        opened("chat", rows[:1], **limits, max_too_long_share=1.0)


def test_a_long_file_of_rows_that_are_too_long_is_refused_early(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.data.formats._CHECK_AFTER", 3)
    monkeypatch.setattr("minigpt.data.store.ROWS_AT_A_TIME", 2)
    with pytest.raises(DataError, match=r"of [3-6] rows, more than 5.0%"):
        opened("chat", [chat_row("x" * 99, "a")] * 50, max_length=40)


PROMPT, CHOSEN, REJECTED = "what is it", "yes it is", "no"


def pair_ids(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    prompt = ChatCodec(tokenizer).encode_prompt(asked(PROMPT))
    return [prompt, *(ids(tokenizer, f"{t}<|im_end|>") for t in (CHOSEN, REJECTED))]


@pytest.mark.parametrize(
    ("slack", "max_prompt", "prompt_tokens", "answer"),
    [
        (0, None, None, None),  # fits exactly
        (-1, None, None, -1),  # the longer answer loses its end
        (-1, 5, 5, None),  # the prompt loses its start
        (-1, 99, None, -1),
    ],
)
def test_a_preference_is_cut_at_the_prompts_start_and_the_answers_end(
    opened: Opener,
    tokenizer: PreTrainedTokenizerFast,
    slack: int,
    max_prompt: int | None,
    prompt_tokens: int | None,
    answer: int | None,
) -> None:
    prompt, chosen, rejected = pair_ids(tokenizer)
    limit = len(prompt) + max(len(chosen), len(rejected)) + slack
    row = pair(PROMPT, CHOSEN, REJECTED)
    store = opened("preference", [row], max_length=limit, max_prompt_length=max_prompt)
    expected = [prompt[-prompt_tokens:] if prompt_tokens else prompt, chosen[:answer], rejected]
    assert runs(store) == [expected]
    assert store.meta["cut"] == int(slack < 0)
    assert store.meta["targets"] == len(expected[1]) + len(expected[2])
    assert store.targets is None


def test_margins_come_with_their_pairs(opened: Opener) -> None:
    rows = [pair(PROMPT, CHOSEN, REJECTED), {**pair(PROMPT, CHOSEN, REJECTED), "margin": 1.5}]
    store = opened("preference", rows)
    samples = [store.sample(number) for number in range(2)]
    assert collate(samples).margins == (0.0, 1.5)


def test_a_prompt_leaves_an_answer_one_token_at_least(
    opened: Opener, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt, chosen, rejected = pair_ids(tokenizer)
    store = opened("preference", [pair(PROMPT, CHOSEN, REJECTED)], max_length=4)
    assert runs(store) == [[prompt[-3:], chosen[:1], rejected[:1]]]


def test_answers_that_the_cut_makes_equal_are_dropped_and_counted(
    opened: Opener, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [pair(PROMPT, "zzzzzzzzA", "zzzzzzzzB"), pair(PROMPT, CHOSEN, REJECTED)]
    limits = {"max_length": 10, "max_prompt_length": 4}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no target token is left"):
        opened("preference", rows, **limits)
    store = opened("preference", rows, **limits, max_too_long_share=0.5)
    assert store.lines().tolist() == [2]
    assert store.meta["too_long"] == 1


def test_a_store_is_built_once(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened("text", [{"text": "a"}])
    before = first.path.stat().st_mtime_ns
    monkeypatch.setattr(stores, "_build", lambda *_: pytest.fail("built again"))
    again = opened("text", [{"text": "a"}])
    assert (again.path, again.path.stat().st_mtime_ns) == (first.path, before)
    assert runs(again) == runs(first)
    assert opened.entries() == [first.path.name]
    assert first.path.name.startswith("rows-")


def test_the_default_cache_is_the_environments(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "other"))
    opened.cache = None  # type: ignore[assignment]
    assert opened("text", [{"text": "a"}]).path.parent == tmp_path / "other" / "tokens"
    monkeypatch.delenv("MINIGPT_CACHE")
    assert stores.default_cache() == Path.home() / ".cache" / "minigpt"


def test_whatever_decides_a_stores_content_names_it(opened: Opener, corpus_file: Path) -> None:
    rows = [chat_row("u", "a")]
    changed = copy.deepcopy(opened.tokenizer)
    changed.chat_template = "{{ bos_token }}" + changed.chat_template
    ended = copy.deepcopy(opened.tokenizer)
    ended.eos_token = "<|pad|>"
    paths = [opened("chat", rows).path, opened("chat", [chat_row("u", "b")]).path]
    paths.append(opened("chat", rows, max_length=100).path)
    paths.append(opened("chat", rows, data_limit=1).path)
    paths.append(opened("chat", rows, on_bad_row="skip").path)
    for tokenizer in (tokenizers.train([corpus_file], 300), changed, ended):
        opened.tokenizer = tokenizer
        paths.append(opened("chat", rows).path)
    assert max(Counter(paths).values()) == 1
    assert len(opened.entries()) == len(paths) == 8


def test_a_reloaded_tokenizer_finds_the_store(opened: Opener, tmp_path: Path) -> None:
    path = opened("chat", [chat_row("u", "a")]).path
    tokenizers.save(opened.tokenizer, tmp_path / "tok")
    opened.tokenizer = tokenizers.load(tmp_path / "tok")
    assert opened("chat", [chat_row("u", "a")]).path == path


@pytest.mark.parametrize(
    ("kind", "row", "location", "reason"),
    [
        ("text", {"text": "a<|im_end|>b"}, "2:text", "special_token"),
        ("text", {"text": "<|pad|>"}, "2:text", "special_token"),
        ("chat", chat_row("u", "<|endoftext|>"), r"2:messages\[1\]\.content", "special_token"),
        ("preference", pair("u", "a<|im_start|>", "b"), "2:chosen", "special_token"),
        ("text", {"text": "\ud800"}, "2:text", "lone_surrogate"),
        ("text", {"txt": "a"}, "2", "missing_key"),
    ],
)
def test_a_build_that_fails_names_the_row_and_leaves_nothing(
    opened: Opener, kind: Kind, row: object, location: str, reason: str
) -> None:
    good = {
        "preference": pair("u", "a", "b"),
        "chat": chat_row("u", "a"),
        "text": {"text": "a"},
    }[kind]
    with pytest.raises(DataError, match=rf"rows\.jsonl:{location}: ") as caught:
        opened(kind, [good, row])
    assert (caught.value.line, caught.value.reason) == (2, reason)
    assert opened.entries() == []


def test_a_build_that_breaks_leaves_nothing(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        opened("text", [{"text": "a"}])
    assert opened.entries() == []


def test_a_missing_file_is_a_data_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(DataError, match="no such file"):
            open_store(path, "text", tokenizer, Limits(), tmp_path / "cache")


def test_the_loser_of_a_race_takes_the_winners_store(opened: Opener) -> None:
    winner = opened("text", [{"text": "a"}])
    (winner.path / "of the winner").touch()
    content = stores._content_digest(opened.file)
    stores._build(opened.file, content, "text", opened.tokenizer, Limits(), winner.path)
    assert opened.entries() == [winner.path.name]
    assert (winner.path / "of the winner").exists()


@pytest.mark.parametrize("name", ["tokens", "samples", "lengths", "targets", "meta", "sums"])
@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_damaged_store_is_built_again(
    name: str, damage: str, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [chat_row("hi", "yes"), chat_row("春眠", "不觉 晓")]
    store = opened("chat", rows)
    before, file = runs(store), next(store.path.glob(f"{name}.*"))
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 2)
    again = opened("chat", rows)
    assert again.path == store.path
    assert runs(again) == before
    assert again.targets is not None
    assert opened.entries() == [store.path.name]
    message = f"The token store {store.path} is damaged, or of an earlier version: built again."
    assert caplog.messages.count(message) == 1
    caplog.clear()
    opened("chat", rows)
    assert not caplog.messages


def others_may_write(path: Path) -> None:
    (path / "tokens.bin").chmod(0o666)


def others_may_add(path: Path) -> None:
    path.chmod(0o775)


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("harm", [others_may_write, others_may_add, a_link])
def test_a_store_that_others_may_have_written_is_built_again(
    harm: Any, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened("text", [{"text": "a"}])
    written = (store.path / "tokens.bin").read_bytes()
    (store.path / "tokens.bin").write_bytes(b"\1" * len(written))
    harm(store.path)
    again = opened("text", [{"text": "a"}])
    assert (again.path / "tokens.bin").read_bytes() == written
    expected = f"The token store {store.path} is another user's, or others may write to it"
    assert caplog.messages.count(f"{expected}: built again.") == 1
    caplog.clear()
    opened("text", [{"text": "a"}])
    assert not caplog.messages


def test_a_store_of_another_user_that_cannot_be_replaced_is_refused(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened("text", [{"text": "a"}])
    monkeypatch.setattr(stores, "is_private", lambda path: path != store.path)
    monkeypatch.setattr(stores, "remove_directory", lambda _: None)
    with pytest.raises(ConfigError, match=r"cannot be replaced.*MINIGPT_CACHE"):
        opened("text", [{"text": "a"}])


RACER = """
import sys, time
from pathlib import Path
from minigpt.data import store, tokenizer
here = Path(sys.argv[1])
tok = tokenizer.load(here / "tok")
publish = store._publish
def together(*places):
    (here / "ready-there").touch()
    while not (here / "ready-here").exists():
        time.sleep(0.002)
    publish(*places)
store._publish = together
opened = store.open_store(here / "rows.jsonl", "text", tok, store.Limits(), here / "cache")
print(opened.path.name, len(opened), int(opened.tokens[:].sum()))
"""


def test_two_processes_may_build_at_once(
    opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers.save(opened.tokenizer, tmp_path / "tok")
    opened.file.write_text('{"text": "春眠"}\n{"text": "b"}\n')
    command = [sys.executable, "-c", RACER, str(tmp_path)]
    publish = stores._publish

    def together(*args: Any) -> None:
        """Rename when the other process is about to."""
        (tmp_path / "ready-here").touch()
        while not (tmp_path / "ready-there").exists() and other.poll() is None:
            time.sleep(0.002)
        publish(*args)

    monkeypatch.setattr(stores, "_publish", together)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        try:
            limits = Limits()
            store = open_store(opened.file, "text", opened.tokenizer, limits, opened.cache)
            output, errors = other.communicate(timeout=limit(120))
        finally:
            other.kill()
    assert other.returncode == 0, errors
    assert output.split() == [store.path.name, "2", str(int(store.tokens[:].sum()))]
    assert opened.entries() == [store.path.name]


def test_data_limit_takes_the_first_rows(opened: Opener) -> None:
    rows = [{"text": t} for t in "abcd"]
    store = opened("text", [*rows[:2], {"bad": 1}], data_limit=2)
    assert store.lines().tolist() == [1, 2]
    assert store.meta["rows"] == 2


def test_an_epochs_order_holds_little_in_memory(tmp_path: Path) -> None:
    """Less than the table of samples, through all of which it passes."""
    code = """
import json, sys
from pathlib import Path
import numpy as np
from minigpt.data.order import FileShare, PackedOrder
from minigpt.data.store import SAMPLE, TokenStore, write_sums
from minigpt.machine import peak_memory

at, many = Path(sys.argv[1]), int(sys.argv[2])
with (at / "samples.bin").open("wb") as file:
    file.truncate(many * SAMPLE.itemsize)
np.full(many, 100, "<i4").tofile(at / "lengths.bin")
np.zeros(1, np.uint16).tofile(at / "tokens.bin")
meta = {"dtype": "uint16", "tokens": 1, "samples": many, "highest_id": 0}
(at / "meta.json").write_text(json.dumps(meta))
write_sums(at)
store = TokenStore(at, at)
before = peak_memory()["peak_rss_mb"]
order = PackedOrder([store.lengths], [FileShare(many, many)], 4096, seed=0)
assert order.count() >= many // 40
print(peak_memory()["peak_rss_mb"] - before)
"""
    many = 400_000
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(many)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 0.6 * many * stores.SAMPLE.itemsize / 1e6


def test_a_large_vocabulary_takes_four_bytes(
    opened: Opener, tokenizer: PreTrainedTokenizerFast
) -> None:
    large = copy.deepcopy(tokenizer)
    large.add_tokens([f"w{i:05}" for i in range(70_000 - len(large))])
    opened.tokenizer = large
    store = opened("text", [{"text": "w69000"}])
    assert store.tokens.dtype == np.uint32
    assert store.tokens[:].tolist() == [69_340, 0]


def test_rows_are_read_in_portions(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "ROWS_AT_A_TIME", 3)
    store = opened("text", [{"text": f"{i}"} for i in range(10)])
    assert store.meta["rows"] == len(store) == 10
    assert [row[1][:-1] for row in runs(store)] == [
        ids(opened.tokenizer, f"{i}") for i in range(10)
    ]


# Damage

CHATS = [chat_row("hi", "yes"), chat_row("春眠", "不觉 晓"), chat_row("a", "b", "c", "d")]


def read_all(store: TokenStore) -> list[tuple[Any, ...]]:
    """Return all that a run learns from a store."""
    lengths = store.lengths(np.arange(len(store))).tolist()
    samples = [store.sample(number) for number in range(len(store))]
    return [
        (n, s.ids.tolist(), s.prompt, s.answers, s.targets is not None and s.targets.tolist())
        for n, s in zip(lengths, samples, strict=True)
    ]


@pytest.mark.parametrize("block", [16, 1 << 14])
def test_each_flipped_bit_of_a_store_is_noticed(
    block: int, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "BLOCK", block)
    path = opened("chat", CHATS).path
    written = {file: file.read_bytes() for file in path.iterdir()}
    bits = [(file, bit) for file, data in written.items() for bit in range(8 * len(data))]
    for file, bit in random.Random(0).sample(bits, 400):
        data = bytearray(written[file])
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises((ValueError, DataError)):
            read_all(TokenStore(path, opened.file))
        file.write_bytes(written[file])
        (path / stores.DAMAGED).unlink(missing_ok=True)
    assert len(read_all(TokenStore(path, opened.file))) == 3


@pytest.mark.parametrize("name", ["tokens", "samples", "targets"])
def test_damage_is_told_at_its_first_touch_and_mended_by_the_next_start(
    name: str, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block is compared once in a run, and what lies in others does not matter."""
    monkeypatch.setattr(stores, "BLOCK", 16)
    original = opened("chat", CHATS)
    before, file = read_all(original), original.path / f"{name}.bin"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    store = opened("chat", CHATS)
    assert store.sample(0).ids.tolist() == before[0][1]
    message = (
        rf"rows.jsonl: its token store {original.path} is damaged: block \d+ of {name}.bin is not"
    )
    with pytest.raises(DataError, match=f"{message}.* It is built again at the next start"):
        store.sample(2)
    assert read_all(opened("chat", CHATS)) == before
    assert opened.entries() == [original.path.name]


@pytest.mark.parametrize("name", ["tokens", "samples", "targets"])
@pytest.mark.parametrize("verified", [False, True])
def test_a_store_that_is_cut_off_while_it_is_open_is_told(
    name: str, verified: bool, opened: Opener
) -> None:
    store = opened("chat", CHATS)
    if verified:
        read_all(store)
    os.truncate(store.path / f"{name}.bin", 2)
    with pytest.raises(DataError, match=rf"is damaged: {name}\.bin is shorter than it was"):
        store.sample(2)


def test_no_id_out_of_range_is_read(opened: Opener) -> None:
    """Not even where a file is written over after its sums were compared."""
    store = opened("text", [{"text": "a b c"}])
    read_all(store)
    np.full(len(store.tokens), store.highest_id + 1, store.tokens.dtype).tofile(
        store.path / "tokens.bin"
    )
    with pytest.raises(DataError, match="is damaged: sample 0 is not what was written"):
        store.sample(0)


def test_a_disk_that_cannot_be_read_is_no_damage(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened("text", [{"text": "a"}])

    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(DataError, match=r"cannot be read: .*tokens\.bin: Input/output error"):
        store.tokens[:]
    assert not (store.path / stores.DAMAGED).exists()


def test_a_store_reaches_processes_that_are_not_forked(opened: Opener) -> None:
    store = opened("chat", CHATS)
    assert read_all(pickle.loads(pickle.dumps(store))) == read_all(store)


def rows_of(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "array": lambda data: b"[" + data.strip().replace(b"\n", b",") + b"]",
}
CHANGES: dict[str, tuple[str, ...]] = {
    "appended": ("春眠", "b", "c"),
    "another first row": ("x", "b"),
    "another last row": ("春眠", "x"),
    "cut off": ("春眠",),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["_content_digest", "refused_texts", "write_json"])
@pytest.mark.parametrize("limit", [None, 1])
def test_a_file_that_changes_while_its_store_is_built_is_refused(
    encoding: str,
    change: str,
    when: str,
    limit: int | None,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it is read, it must be noticed; what comes when all is read is another store's."""
    encode, plain = ENCODINGS[encoding], getattr(stores, when)
    opened.file.write_bytes(encode(rows_of("春眠", "b")))

    def changed(*args: Any) -> Any:
        value = plain(*args)
        opened.file.write_bytes(encode(rows_of(*CHANGES[change])))
        return value

    monkeypatch.setattr(stores, when, changed)
    args = ("text", opened.tokenizer, Limits(data_limit=limit), opened.cache)
    if when != "write_json":
        with pytest.raises(DataError, match="changed while it was read"):
            open_store(opened.file, *args)
        assert opened.entries() == []
        return
    first = open_store(opened.file, *args)
    monkeypatch.undo()
    assert open_store(opened.file, *args).path != first.path


def test_rows_that_come_while_others_are_tokenised_are_noticed(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = stores._Writer.add

    def and_append(*args: Any) -> None:
        add(*args)
        with opened.file.open("ab") as file:
            file.write(rows_of("more"))

    monkeypatch.setattr(stores._Writer, "add", and_append)
    with pytest.raises(DataError, match="changed while it was read"):
        opened("text", [{"text": "a"}])
    assert opened.entries() == []
