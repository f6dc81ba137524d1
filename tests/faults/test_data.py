"""Data: no row is lost in silence, no store is used half done, memory does not grow."""

from __future__ import annotations

import gzip
import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import eventually, limit
from runs import Running, Start, blocked_in, meet, rows, status  # type: ignore[import-not-found]
from tokenizers import Tokenizer

from minigpt.data import tokenizer as tokenizers
from minigpt.data.chat import refused_texts
from minigpt.data.formats import BadRows, Chat, Kind, Text, read_records
from minigpt.data.order import FileShare, PackedOrder
from minigpt.data.store import Limits, TokenStore, open_store
from minigpt.errors import DataError

GOOD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
MESSAGES = b'{"messages": %s}'
# Bad rows: the line, the reason it is counted by, the field that is named.
BAD: list[tuple[bytes, str, str | None]] = [
    (b'{"messages": [', "bad_json", None),
    (b"not json", "bad_json", None),
    (b'{"messages": [], "x": "\xff"}', "bad_utf8", None),
    (b"[1, 2]", "wrong_type", None),
    (b'{"ask": "a", "reply": "b"}', "missing_key", None),
    (MESSAGES % b'"hi"', "wrong_type", "messages"),
    (MESSAGES % b"[]", "no_messages", "messages"),
    (MESSAGES % b'[{"role": "user"}]', "missing_key", "messages[0]"),
    (MESSAGES % b'[{"role": "user", "content": 3}]', "wrong_type", "messages[0].content"),
    (MESSAGES % b'[{"role": "user", "content": "hi"}]', "no_assistant", "messages[0].role"),
    (MESSAGES % b'[{"role": "boss", "content": "hi"}]', "unknown_role", "messages[0].role"),
    (MESSAGES % b'[{"role": "tool", "content": "hi"}]', "tool_role", "messages[0].role"),
    (MESSAGES % b'[{"role": "assistant", "content": "a"}]', "role_order", "messages[0].role"),
    (b'{"prompt": "hi", "completion": " "}', "empty", "completion"),
    (b'{"prompt": "\\ud800", "completion": "a"}', "lone_surrogate", "prompt"),
    (b'{"prompt": "hi", "completion": "<|im_end|>"}', "special_token", "completion"),
]


def rows_with(bad: bytes, path: Path, good: int = 40) -> Path:
    """Write good rows with a bad one on line 3."""
    lines = [json.dumps({"messages": GOOD}).encode()] * good
    lines[2:2] = [bad]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.mark.parametrize(("bad", "reason", "field"), BAD[::6])
def test_a_bad_row_stops_a_run_before_its_first_step_by_name(
    bad: bytes, reason: str, field: str | None, start: Start, tmp_path: Path
) -> None:
    file = rows_with(bad, tmp_path / "rows.jsonl")
    run = start("sft", "run", data__init_args__train=str(file))
    assert run.wait() == 2
    assert f"minigpt: {file}:3:" + (f"{field}:" if field else "") in run.output
    assert "Traceback" not in run.output
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Any:
    """The runs' tokenizer with a token of two line ends, which reaches from turn to answer."""
    spec = json.loads(tokenizers.load(world / "sft" / "hf").backend_tokenizer.to_str())
    spec["model"]["vocab"]["ĊĊ"] = len(spec["model"]["vocab"])
    spec["model"]["merges"].append(["Ċ", "Ċ"])
    return tokenizers.wrap(Tokenizer.from_str(json.dumps(spec)))


@pytest.mark.parametrize(("bad", "reason", "field"), BAD)
def test_each_kind_of_bad_row_is_named_or_counted(
    bad: bytes, reason: str, field: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    file = rows_with(bad, tmp_path / "rows.jsonl")
    with pytest.raises(DataError) as caught:
        open_store(file, "chat", tokenizer, Limits(), tmp_path)
    error = caught.value
    assert (error.path, error.line, error.field) == (file, 3, field)
    assert error.reason == reason
    store = open_store(file, "chat", tokenizer, Limits(on_bad_row="skip"), tmp_path)
    assert store.meta["skipped"] == {reason: 1}
    assert store.lines().tolist() == [1, 2, *range(4, 42)]
    limits = Limits(on_bad_row="skip", max_bad_share=0.01)
    with pytest.raises(DataError, match=r"more than 1\.0% of 41 rows"):
        open_store(file, "chat", tokenizer, limits, tmp_path)


def test_a_lenient_run_says_what_it_left_out(start: Start, tmp_path: Path) -> None:
    file = rows_with(BAD[1][0], tmp_path / "rows.jsonl")
    changes = {"data__init_args__train": str(file), "data__init_args__on_bad_row": "skip"}
    run = start("sft", "run", **changes)
    assert run.wait() == 0, run.output
    assert f"skipped 1 bad rows: 1 bad_json (first {file}:3)" in run.output


# Stores under construction


def corpus(path: Path, megabytes: float) -> Path:
    """Write texts of about 1 kB, no two the same."""
    words = (tiny_runs.WORDS + " 春眠 不觉 晓 处处 闻啼鸟").split()
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < megabytes * 1e6:
            drawn = rng.integers(len(words), size=(1000, 200)).tolist()
            for row in drawn:
                text = f"{number} " + " ".join([words[i] for i in row])
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                number += 1
    return path


def stores(cache: Path) -> tuple[list[Path], list[Path]]:
    """Return a cache's finished stores and those that are being built."""
    paths = sorted(cache.glob("tokens/*")) if cache.exists() else []
    partial = [path for path in paths if path.name.startswith(".")]
    return [path for path in paths if path not in partial], partial


def test_a_store_that_was_cut_off_is_not_used(start: Start, tmp_path: Path) -> None:
    file, cache = corpus(tmp_path / "corpus.jsonl", 3), tmp_path / "cache"
    changes = {"data__init_args__train": str(file), "env": {"MINIGPT_CACHE": str(cache)}}
    never = blocked_in("minigpt.data.store._publish")
    other = cache / "tokens" / ".corpus-20261128"
    for _ in range(3):
        run = start("pretrain", "run", trainer__callbacks=never, **changes)
        eventually(lambda: [*cache.glob("tokens/.*/new/tokens.bin")])
        other.mkdir(exist_ok=True)
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        finished, partial = stores(cache)
        assert not [path for path in finished if path.name.startswith("corpus")]
        (left,) = (path for path in partial if path != other)  # the one before is removed
        (left / "new" / "tokens.bin").rename(left / "new" / "cut off")  # seen, were it used
    assert start("pretrain", "run", **changes).wait() == 0
    assert stores(cache)[1] == [other]
    (directory,) = (path for path in stores(cache)[0] if path.name.startswith("corpus"))
    assert not (directory / "cut off").exists()
    store = TokenStore(directory, file)
    assert store.lines()[-1] == store.meta["rows"] == file.read_bytes().count(b"\n")


def test_two_runs_build_one_store_at_once(start: Start, tmp_path: Path) -> None:
    file, cache = corpus(tmp_path / "corpus.jsonl", 1), tmp_path / "cache"
    changes = {"data__init_args__train": str(file), "env": {"MINIGPT_CACHE": str(cache)}}
    both = [
        start(
            "pretrain", name, trainer__callbacks=meet(tmp_path / name, tmp_path / other), **changes
        )
        for name, other in (("one", "other"), ("other", "one"))
    ]
    assert [run.wait() for run in both] == [0, 0], [run.output for run in both]
    finished, partial = stores(cache)
    assert len([path for path in finished if path.name.startswith("corpus")]) == 1
    assert partial == []
    exported = [tmp_path / name / "hf" / "model.safetensors" for name in ("one", "other")]
    assert exported[0].read_bytes() == exported[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("tokens", 2),
        ("tokens", 0),
        pytest.param("samples", 0, marks=pytest.mark.faults),
        pytest.param("targets", 2, marks=pytest.mark.faults),
    ],
)
def test_a_store_that_is_cut_off_while_it_is_read_ends_the_run_in_words(
    name: str, workers: int, start: Start, world: Path, tmp_path: Path
) -> None:
    """Reading from a mapping would end the process by SIGBUS, and leave `running`."""
    file, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    file.write_bytes((world / "sft.jsonl").read_bytes())
    changes: dict[str, Any] = {
        "data__init_args__train": str(file),
        "data__init_args__cache_dir": str(cache),
        "data__init_args__num_workers": workers,
    }
    assert start("sft", "whole", **changes).wait() == 0
    options = {"pattern": f"rows-*/{name}.bin", "cache": str(cache), "number": 6}
    cut = [{"class_path": "moments.CutOff", "init_args": options}]
    run = start("sft", "run", trainer__callbacks=cut, **changes)
    assert run.wait() == 2, run.output
    (last,) = (line for line in run.output.splitlines() if line.startswith("minigpt: "))
    assert last.startswith(f"minigpt: {file}: its token store {cache}/rows-")
    assert f"is damaged: {name}.bin is shorter than it was. It is built again" in last
    assert "Traceback" not in run.output
    assert status(tmp_path / "run")["state"] == "failed"
    again = start("sft", "run", "--ckpt_path", "auto", **changes)
    assert again.wait() == 0, again.output
    assert "damaged, or of an earlier version: built again" in again.output
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


# Memory


def private_memory(run: Running) -> float:
    """Wait for a run; return the most private memory (MB) it was seen to hold."""
    most, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.02):
            try:
                lines = Path(f"/proc/{run.pid}/status").read_text().splitlines()
            except OSError:
                return
            sizes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon")]
            most[0] = max(most[0], *sizes, 0)

    watch = threading.Thread(target=look)
    watch.start()
    try:
        assert run.wait(3000) == 0, run.output
    finally:
        done.set()
        watch.join()
    return most[0] / 1000


def trained_on(megabytes: float, start: Start, tmp_path: Path) -> float:
    file = corpus(tmp_path / f"{megabytes}.jsonl", megabytes)
    name, cache = f"run-{megabytes}", {"MINIGPT_CACHE": str(tmp_path / "cache")}
    used = private_memory(start("pretrain", name, data__init_args__train=str(file), env=cache))
    file.unlink()
    print(f"\n{megabytes} MB of JSONL: {used:.0f} MB of private memory")
    return used


@pytest.mark.faults
def test_memory_does_not_grow_with_the_corpus(start: Start, tmp_path: Path) -> None:
    small, large = (trained_on(size, start, tmp_path) for size in (5, 65))
    assert large - small < 45  # MB: noise, where the tokens alone, of 60 MB more, are 54 MB


@pytest.mark.large
@pytest.mark.timeout(limit(3600))
def test_2_gb_are_trained_on_in_900_mb(start: Start, tmp_path: Path) -> None:
    assert trained_on(2000, start, tmp_path) < 900


# Any file at all

LONGEST = 32  # tokens of a sample
TEXT = st.text(max_size=12)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXT}
)
ROW = st.one_of(
    st.fixed_dictionaries({"text": TEXT}),
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4)}),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    st.dictionaries(TEXT, st.none() | st.integers() | TEXT, max_size=2),
)
LINE = ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"))
GARBLED = st.tuples(LINE, st.integers(0, 99), st.binary(max_size=3)).map(
    lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] :]
)
PLAIN = st.lists(LINE | LINE | GARBLED | st.binary(max_size=8), max_size=7).map(b"\n".join)
ARRAY = st.lists(ROW, max_size=5).map(lambda rows: json.dumps(rows).encode())
FILE = st.one_of(
    PLAIN,
    ARRAY,
    PLAIN.map(gzip.compress),
    PLAIN.map(lambda data: gzip.compress(data)[:-5]),
    PLAIN.map(lambda data: b"\xef\xbb\xbf" + data),
    PLAIN.map(lambda data: data.replace(b"\n", b"\r\n")),
    TEXT.map(lambda text: text.encode("utf-16", "surrogatepass")),
)

# Mostly good, and often too long for a sample.
LONG = st.builds(
    str.__mul__, st.text("abc 春\n", min_size=1, max_size=15), st.sampled_from([1, 1, 1, 5])
)
SPECIAL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")
# What a user says may hold special tokens; answers may begin as the text before them ends.
ASKED = st.one_of(*[LONG] * 7, st.sampled_from(["<|im_end|>", "a<<|im_start|>|>"]))
ANSWER = st.one_of(*[LONG] * 7, st.sampled_from(["\n", "\n\n"]).map(lambda space: f"{space}a"))
TURNS = st.lists(st.tuples(ASKED, ANSWER), min_size=1, max_size=3).map(
    lambda pairs: [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
)
FIT = {
    "text": st.fixed_dictionaries({"text": LONG}),
    "chat": st.fixed_dictionaries({"messages": TURNS}),
    "preference": st.fixed_dictionaries({"prompt": ASKED, "chosen": ANSWER, "rejected": ANSWER}),
}


def file_of(kind: Kind) -> st.SearchStrategy[tuple[bytes, Kind]]:
    """Any file at all, one in which most rows are of the kind, or one in which all are."""
    good = st.lists(FIT[kind], min_size=1, max_size=4)
    mixed = st.tuples(good, ROW).map(lambda pair: [*pair[0], pair[1]])
    fitting, most = (
        rows.map(lambda items: "\n".join(map(json.dumps, items)).encode()) for rows in (good, mixed)
    )
    drawn = st.sampled_from([FILE, most, fitting, fitting]).flatmap(lambda files: files)
    return st.tuples(drawn, st.just(kind))


def opened(file: Path, kind: Kind, tokenizer: Any, policy: Any) -> TokenStore | DataError:
    limits = Limits(LONGEST, on_bad_row=policy, max_bad_share=1.0, max_too_long_share=1.0)
    try:
        return open_store(file, kind, tokenizer, limits, file.parent / policy)
    except DataError as error:
        return error


def check(data: bytes, kind: Kind, tokenizer: Any, directory: Path) -> str:
    """Read a file strictly and leniently; return what became of it."""
    file = directory / "any.jsonl"
    file.write_bytes(data)
    strict, lenient = (opened(file, kind, tokenizer, policy) for policy in ("error", "skip"))
    if isinstance(strict, DataError):
        assert strict.path == file or strict.reason in ("no_rows", "no_targets")
    if isinstance(lenient, DataError):
        assert isinstance(strict, DataError)
        return "refused"
    skipped = lenient.meta["skipped"]
    assert isinstance(strict, DataError) == bool(skipped)
    if isinstance(strict, DataError):
        assert strict.reason in skipped
        assert strict.line
    bad = BadRows("skip", 1.0)
    records = list(read_records([file], kind, bad, None, refused_texts(tokenizer, kind)))
    assert not bad.counts - Counter(skipped)  # the store leaves out more, for its length
    read_back(lenient, records, kind, tokenizer)
    packed_once(lenient)
    cut = lenient.meta["cut"] or len(lenient) > len(records)
    return "skipped some" if skipped else "cut" if cut else "read"


def read_back(store: TokenStore, records: list[Any], kind: Kind, tokenizer: Any) -> None:
    """The store holds the ids of each record as they are made here, and none but those."""
    lines = store.lines().tolist()
    assert lines == sorted(lines)
    assert len(store.tokens) == int(store.lengths(np.arange(len(store))).sum())
    stored: dict[int, list[list[list[int]]]] = {}
    for start, line, prompt, answers, *_ in store.samples[:].tolist():
        borders = start + np.cumsum([0, prompt, *answers])
        runs = [store.tokens[a:b].tolist() for a, b in pairwise(borders)]
        if store.targets is not None:
            runs.append(store.targets[borders[0] : borders[-1]].tolist())
        stored.setdefault(line, []).append(runs)
    expected = {source.line: samples_of(record, tokenizer) for record, source in records}
    assert stored == {line: samples for line, samples in expected.items() if samples}


def samples_of(record: Any, tokenizer: Any) -> list[list[list[int]]]:
    """Prompt, first and second run (and targets of a chat) of each sample, by ChatML's rules."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    if isinstance(record, Text):
        left, samples = [*ids(record.text), tokenizer.convert_tokens_to_ids("<|endoftext|>")], []
        while len(left) > 1 or not samples:
            samples.append([[], left[:LONGEST], []])
            left = left[LONGEST - 1 :]  # the last token is the next sample's first
        return samples
    if isinstance(record, Chat):
        runs = ((flat[:LONGEST], marks[:LONGEST]) for flat, marks in chat_runs(record, ids))
        return [[[], flat, [], marks] for flat, marks in runs if any(marks[1:])]
    begun = asked(record.prompt)
    prompt = ids_of_runs(begun, ids)[-(LONGEST - 1) :]
    answer_limit = LONGEST - len(prompt)
    chosen, rejected = (
        answer_ids(begun, answer, ids)[:answer_limit] for answer in (record.chosen, record.rejected)
    )
    return [[prompt, chosen, rejected]] if chosen != rejected else []


def asked(messages: Any) -> list[str]:
    """Render messages that are to be answered: runs of text that are tokenised apart.

    A run ends within each special token that system or user say, behind its first character.
    """
    runs = [""]
    for message in messages:
        content = message.content
        if message.role != "assistant":
            first, *others = SPECIAL.sub(
                lambda match: f"<\ud800{match.group()[1:]}", content
            ).split("\ud800")
            runs[-1] += f"<|im_start|>{message.role}\n{first}"
            runs += others
            content = ""
        else:
            runs[-1] += "<|im_start|>assistant\n"
        runs[-1] += f"{content}<|im_end|>\n"
    runs[-1] += "<|im_start|>assistant\n"
    return runs


def ids_of_runs(runs: list[str], ids: Callable[[str], list[int]]) -> list[int]:
    return [token for run in runs for token in ids(run)]


def answer_ids(prompt: list[str], answer: Any, ids: Callable[[str], list[int]]) -> list[int]:
    """Encode an answer behind its prompt; alone, where a token would reach into it."""
    text, start = f"{answer.content}<|im_end|>", ids_of_runs(prompt, ids)
    full = ids_of_runs([*prompt[:-1], prompt[-1] + text], ids)
    return full[len(start) :] if full[: len(start)] == start else ids(text)


def chat_runs(chat: Chat, ids: Callable[[str], list[int]]) -> list[tuple[list[int], list[bool]]]:
    """Encode a chat up to the end of its last answer; say what is learnt.

    Where a prompt does not go on from the ids of the last answer, a new sample begins.
    """
    samples: list[tuple[list[int], list[bool]]] = []
    for index, message in enumerate(chat.messages):
        if message.role != "assistant":
            continue
        prompt = asked(chat.messages[:index])
        start, learnt = ids_of_runs(prompt, ids), answer_ids(prompt, message, ids)
        before, marks = samples.pop() if samples else ([], [])
        if start[: len(before)] != before:
            samples.append((before, marks))
            before, marks = [], []
        marks = marks + [False] * (len(start) - len(before)) + [True] * len(learnt)
        samples.append((start + learnt, marks))
    return samples


def packed_once(store: TokenStore) -> None:
    """An epoch holds each sample once, in micro-batches within their budget."""
    order = PackedOrder([store.lengths], [FileShare(len(store), len(store))], 70, seed=1)
    batches = list(order.batches(0))
    drawn = [sample for batch in batches for _, sample in batch]
    assert sorted(drawn) == list(range(len(store)))
    assert all(store.lengths(np.array([i for _, i in b])).sum() <= 70 for b in batches)


@pytest.mark.parametrize("files", [400, pytest.param(1000, marks=pytest.mark.faults)])
def test_any_file_is_read_exactly_or_refused_with_a_place(
    files: int, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outcomes: Counter[tuple[Kind, str]] = Counter()

    @settings(
        max_examples=files,
        derandomize=files == 400,
    )
    @given(st.sampled_from([*FIT]).flatmap(file_of))
    def any_file(case: tuple[bytes, Kind]) -> None:
        how = check(*case, tokenizer, tmp_path_factory.mktemp("any"))
        outcomes[case[1], how] += 1

    any_file()
    assert sum(outcomes.values()) >= files
    ends = {(kind, how) for kind in FIT for how in ("read", "cut", "skipped some")}
    assert not ends - outcomes.keys()
    assert "refused" in {how for _, how in outcomes}
