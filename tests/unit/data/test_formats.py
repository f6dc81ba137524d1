from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import damage
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.data import formats
from minigpt.data.formats import (
    QUESTIONS,
    BadRows,
    Chat,
    Kind,
    Message,
    Preference,
    Prompt,
    Record,
    Source,
    Text,
    Unpaired,
    completed,
    expand_files,
    iter_rows,
    kind_of,
    load_prompts,
    parse_prompt,
    parse_row,
    read_records,
    renamed,
    suffix_of,
    unused_fields,
)
from minigpt.errors import ConfigError, DataError
from minigpt.reading import MEGABYTE


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


zipped = partial(gzip.compress, mtime=0)  # the names of tests must not change with the time
LINES = b'{"text": "one"}\n{"text": "two"}\n'
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "data", "lines"),
    [
        ("a.jsonl", LINES, [1, 2]),
        ("a.jsonl", LINES.rstrip(), [1, 2]),
        ("a.jsonl", BOM + LINES, [1, 2]),
        ("a.jsonl", b"\n \t\n" + LINES.replace(b"\n", b"\n\n"), [3, 5]),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n"), [1, 2]),
        ("a.jsonl.gz", zipped(LINES), [1, 2]),
        ("a.jsonl", zipped(BOM + LINES), [1, 2]),
        ("a.json", b'[{"text": "one"},\n {"text": "two"}]', [1, 2]),
        ("a.jsonl", BOM + b'\n [\n{"text": "one"}, {"text": "two"}\n]\n\n', [1, 2]),
        ("a.json.gz", zipped(b'[{"text": "one"}, {"text": "two"}]'), [1, 2]),
    ],
)
def test_good_file(tmp_path: Path, name: str, data: bytes, lines: list[int]) -> None:
    path = write(tmp_path / name, data)
    records = list(read_records([str(path)], "text", BadRows()))
    assert records == [
        (Text("one"), Source(path, lines[0])),
        (Text("two"), Source(path, lines[1])),
    ]
    assert [line for line, _ in iter_rows(path)] == lines


@pytest.mark.parametrize(
    ("data", "reason", "line", "fragment"),
    [
        (b"", "no_rows", None, "holds no rows"),
        (BOM + b" \n\n", "no_rows", None, "holds no rows"),
        (b"[]", "no_rows", None, "holds no rows"),
        (LINES + b'{"text": }', "bad_json", 3, "column 10"),
        (b'{"text": "one"', "bad_json", 1, "cut off"),
        (b'{\n  "text": "one"\n}\n', "bad_json", 1, "pretty-printed"),
        (b'[{"text": "one"},\n {"text": }]', "bad_json", 2, "column 11"),
        (b'[{"text": "one"}]\n[{"text": "two"}]\n', "bad_json", 2, "one JSON array"),
        (LINES + '{"text": "café"}'.encode("latin-1"), "bad_utf8", 3, "byte 14 of the line"),
        ('[\n{"text": "и"}]'.encode("koi8-r"), "bad_utf8", 2, "byte 11"),
        (b"\1\0\0\0\2\0\0\0" * 9, "foreign", None, "binary, or UTF-16 without"),
        (b"[" * 100_000, "bad_json", 1, "nested too deeply"),
        (b'{"a":' * 100_000, "bad_json", 1, "nested too deeply"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "bad_json", 1, "too many digits"),
        (zipped(LINES * 500)[:-9], "bad_compression", None, "cut off or damaged"),
        (zipped(LINES)[:12] + b"\xff\xff\xff", "bad_compression", None, "cut off or damaged"),
    ],
)
def test_bad_file(
    tmp_path: Path, data: bytes, reason: str, line: int | None, fragment: str
) -> None:
    path = write(tmp_path / "rows.jsonl", data)
    for rows in (iter_rows(path), read_records([path], "text", BadRows())):
        with pytest.raises(DataError) as caught:
            list(rows)
        error = caught.value
        assert (error.reason, error.path, error.line) == (reason, path, line)
        assert fragment in str(error)


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        list(iter_rows(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="Is a directory"):
        list(iter_rows(tmp_path))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_file_is_decompressed_by_what_it_begins_with(
    compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    expected = [row for _, row in iter_rows(write(tmp_path / "plain.gz", LINES))]
    data = compress(LINES)
    assert [row for _, row in iter_rows(write(tmp_path / "rows", data))] == expected != []
    with pytest.raises(DataError, match="cut off or damaged"):
        list(iter_rows(write(tmp_path / "cut", data[:-9])))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.jsonl", ".jsonl"), ("a.csv.gz", ".csv"), ("a.b.TXT.zst", ".txt"), ("a", ""), ("a.gz", "")],
)
def test_the_ending_under_a_compression(name: str, suffix: str) -> None:
    assert suffix_of(PurePath(name)) == suffix


def test_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = write(tmp_path / "rows.jsonl.zst", zstandard.compress(LINES) * 3)
    assert [line for line, _ in iter_rows(path)] == [1, 2, 3, 4, 5, 6]
    rows = b"".join(b'{"text": "%d"}\n' % (7919 * number) for number in range(50_000))
    compressed = zstandard.compress(rows)
    long = write(tmp_path / "long.zst", compressed)
    assert [line for line, _ in iter_rows(long)] == list(range(1, 50_001))
    for damaged in (compressed[:-9], compressed[:5000] + b"\x00" * 99 + compressed[5099:]):
        with pytest.raises(DataError, match="cut off or damaged"):
            list(iter_rows(write(tmp_path / "cut", damaged)))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match="zstd needs the package zstandard"):
        list(iter_rows(path))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"PK\x03\x04" + bytes(40), "a ZIP archive"),
        (b"%PDF-1.7", "a PDF"),
        (b"{\\rtf1\\ansi", r"a document \(RTF\)"),
    ],
)
def test_a_file_of_another_kind_is_named(data: bytes, name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"the file is {name}"):
        list(iter_rows(write(tmp_path / "rows.jsonl", data)))


def test_folders_and_patterns_stand_for_their_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.txt", "sub/c.csv.gz", "notes.md", "d.json"):
        write(tmp_path / name, LINES)
    folder = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "d.json", "sub/c.csv.gz")]
    assert expand_files([str(tmp_path)]) == folder
    assert expand_files([f"{tmp_path}/*.json*"]) == [folder[1], folder[2]]
    assert expand_files([folder[1], f"{tmp_path}/b*"]) == [folder[1]]
    assert expand_files(["missing.jsonl"]) == ["missing.jsonl"]
    odd = str(write(tmp_path / "a[1].jsonl", LINES))
    assert expand_files([odd]) == [odd]
    for nothing in (f"{tmp_path}/*.arrow", str(tmp_path / "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match="there is no data file"):
            expand_files([nothing])


def test_keys_that_have_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"ask": "Hi?", "reply": "Hello."}\n')
    columns = {"ask": "prompt", "reply": "completion"}
    ((record, _),) = read_records([path], "chat", BadRows(), columns=columns)
    assert record == Chat((user("Hi?"), bot("Hello.")))
    assert load_prompts(path, columns)[0].row == {"ask": "Hi?", "reply": "Hello."}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"output": "text"}, {"instruction": "春?", "text": "Yes."}),
        (
            {"text": "output", "output": "text"},
            {"instruction": "春?", "text": "Yes.", "output": "x"},
        ),
        ({"reply": "text"}, {"instruction": "春?", "output": "Yes.", "text": "x"}),
    ],
)
def test_a_name_that_is_given_replaces_the_key_that_had_it(
    columns: dict[str, str], expected: dict[str, str]
) -> None:
    row = {"instruction": "春?", "output": "Yes.", "text": "x"}
    assert renamed(row, columns) == expected


@pytest.mark.parametrize(
    ("row", "kind", "options"),
    [
        (
            {"id": 1, "用户": "a", "客服": "b"},
            "chat",
            "--columns '用户=question' '客服=answer' in data verbs, "
            "--data.init_args.columns '{用户: question, 客服: answer}' in training",
        ),
        ({"prompt": "a", "the reply": "b"}, "chat", "--columns 'the reply=completion' in"),
        ({"prompt": "a", "good": "b", "bad": "c"}, "preference", "good=chosen bad=rejected in"),
        ({"body": "a"}, "text", "--data.init_args.columns '{body: text}' in training"),
        ({"foo": "a"}, "chat", "see columns."),
        ({"messages": None, "foo=bar": "a"}, "text", "see columns."),
    ],
)
def test_the_refusal_offers_to_rename_the_keys(row: Any, kind: Kind, options: str) -> None:
    with pytest.raises(DataError) as refused:
        parse_row(row, kind)
    assert options in str(refused.value)


def test_a_system_prompt_is_the_system_message() -> None:
    row = {"system_prompt": "Be kind.", "prompt": "a"}
    asked = (system("Be kind."), user("a"))
    assert parse_row({**row, "completion": "b"}, "chat") == Chat((*asked, bot("b")))
    assert parse_prompt(row) == asked


@pytest.mark.parametrize(("ask", "reply"), QUESTIONS.items())
def test_questions_and_answers(ask: str, reply: str) -> None:
    row = {"system": "Be kind.", ask: "Hi?", reply: "Hello."}
    assert parse_row(row, "chat") == Chat((system("Be kind."), user("Hi?"), bot("Hello.")))
    preference = {ask: "Hi?", "chosen": "Hello.", "rejected": "No."}
    assert parse_row(preference, "preference") == Preference(
        (user("Hi?"),), bot("Hello."), bot("No.")
    )


@pytest.mark.parametrize(("value", "margin"), [(0.5, 0.5), (-1, -1.0), ("2.5", 2.5), (None, 0.0)])
def test_a_preference_may_have_a_margin(value: object, margin: float) -> None:
    """Tables of text hold numbers as strings, and null where a row has none."""
    row = {"prompt": "u", "chosen": "a", "rejected": "b", "margin": value}
    assert parse_row(row, "preference") == PAIR._replace(margin=margin)


KINDS: tuple[Kind, ...] = ("text", "chat", "preference", "unpaired")
TYPES = dict(zip(KINDS, (Text, Chat, Preference, Unpaired), strict=True))
SPECIAL = ("<|im_start|>", "<|im_end|>")


def system(text: str) -> Message:
    return Message("system", text)


def user(text: str) -> Message:
    return Message("user", text)


def bot(text: str) -> Message:
    return Message("assistant", text)


def dialogue(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Rows of alternating user and assistant messages."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def labelled(label: object) -> dict[str, object]:
    return {"prompt": "u", "completion": "a", "label": label}


U, A = user("u"), bot("a")
PAIR = Preference((U,), bot("a"), bot("b"))
SYSTEM_PAIR = Preference((system("s"), U), bot("a"), bot("b"))

GOOD: list[tuple[Kind, dict[str, object], Record]] = [
    ("text", {"text": "春眠", "id": 7}, Text("春眠")),
    ("text", {"text": " kept \n", "score": float("nan")}, Text(" kept \n")),
    # conversations
    ("chat", {"messages": dialogue("u", "a")}, Chat((U, A))),
    ("chat", {"conversations": dialogue("u", "a")}, Chat((U, A))),
    ("chat", {"messages": dialogue("u", "a", "v")}, Chat((U, A, user("v")))),
    ("chat", {"messages": dialogue("u", "a", system="s")}, Chat((system("s"), U, A))),
    ("chat", {"messages": dialogue("u", "a", system="")}, Chat((U, A))),
    ("chat", {"system": "s", "messages": dialogue("u", "a")}, Chat((system("s"), U, A))),
    ("chat", {"system": "", "messages": dialogue("u", "a", system="s")}, Chat((system("s"), U, A))),
    ("chat", {"messages": None, "conversations": dialogue("u", "a")}, Chat((U, A))),
    (
        "chat",
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        Chat((U, A)),
    ),
    (
        "chat",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "u"},
                {"from": "assistant", "value": "a"},
            ]
        },
        Chat((system("s"), U, A)),
    ),
    # an SFT split of a preference set
    ("chat", {"messages": dialogue("u", "a"), "chosen": "a", "rejected": "b"}, Chat((U, A))),
    # alpaca
    ("chat", {"instruction": "u", "input": "", "output": "a"}, Chat((U, A))),
    ("chat", {"instruction": "u", "output": "a", "history": []}, Chat((U, A))),
    ("chat", {"instruction": "u", "input": "v", "output": "a"}, Chat((user("u\nv"), A))),
    ("chat", {"instruction": "", "input": "v", "output": "a"}, Chat((user("v"), A))),
    (
        "chat",
        {
            "instruction": "u",
            "input": None,
            "output": "a",
            "system": "s",
            "history": [["q", "b"], ["r", "c"]],
        },
        Chat((system("s"), user("q"), bot("b"), user("r"), bot("c"), U, A)),
    ),
    # prompt and completion
    ("chat", {"prompt": "u", "completion": "a"}, Chat((U, A))),
    ("chat", {"prompt": dialogue("u"), "completion": [answer("a")]}, Chat((U, A))),
    (
        "chat",
        {"prompt": dialogue("u"), "completion": "a", "system": "s"},
        Chat((system("s"), U, A)),
    ),
    # preferences
    ("preference", {"chosen": dialogue("u", "a"), "rejected": dialogue("u", "b")}, PAIR),
    (
        "preference",
        {"chosen": dialogue("u", "a", "v", "x"), "rejected": dialogue("u", "a", "v", "y")},
        Preference((U, A, user("v")), bot("x"), bot("y")),
    ),
    (
        "preference",  # split on messages, never on the characters that answers share
        {"chosen": dialogue("u", "yes"), "rejected": dialogue("u", "yesterday")},
        Preference((U,), bot("yes"), bot("yesterday")),
    ),
    ("preference", {"prompt": "u", "chosen": "a", "rejected": "b"}, PAIR),
    (
        "preference",
        {"prompt": dialogue("u"), "chosen": answer("a"), "rejected": [answer("b")]},
        PAIR,
    ),
    (
        "preference",
        {"prompt": "u", "chosen": dialogue("u", "a"), "rejected": dialogue("u", "b")},
        PAIR,
    ),
    (
        "preference",  # the whole chosen chat comes along as 'messages'
        {
            "prompt": "u",
            "messages": dialogue("u", "a"),
            "chosen": dialogue("u", "a"),
            "rejected": dialogue("u", "b"),
        },
        PAIR,
    ),
    (
        "preference",
        {
            "prompt": dialogue("u", system="s"),
            "chosen": dialogue("u", "a", system="s"),
            "rejected": dialogue("u", "b"),
        },
        SYSTEM_PAIR,
    ),
    ("preference", {"system": "s", "prompt": "u", "chosen": "a", "rejected": "b"}, SYSTEM_PAIR),
    (
        "preference",
        {
            "conversations": [{"from": "human", "value": "u"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        PAIR,
    ),
    ("preference", {"messages": dialogue("u"), "chosen": "a", "rejected": answer("b")}, PAIR),
    (
        "preference",
        {"instruction": "u", "input": "v", "chosen": "a", "rejected": "b"},
        Preference((user("u\nv"),), bot("a"), bot("b")),
    ),
    # unpaired: as TRL and LLaMA-Factory write them
    ("unpaired", {"prompt": "u", "completion": "a", "label": True}, Unpaired((U,), A, True)),
    (
        "unpaired",
        {"prompt": dialogue("u"), "completion": [answer("a")], "label": False},
        Unpaired((U,), A, False),
    ),
    (
        "unpaired",
        {"messages": dialogue("u"), "completion": "a", "label": 1},
        Unpaired((U,), A, True),
    ),
    (
        "unpaired",
        {"system": "s", "prompt": "u", "completion": dialogue("u", "a"), "label": 0.0},
        Unpaired((system("s"), U), A, False),
    ),
    (
        "unpaired",
        {"messages": dialogue("u", "a", "v", "b"), "kto_tag": "True"},
        Unpaired((U, A, user("v")), bot("b"), True),
    ),
    (
        "unpaired",
        {
            "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
            "label": None,
            "kto_tag": False,
        },
        Unpaired((U,), A, False),
    ),
    (
        "unpaired",
        {"instruction": "u", "input": "", "output": "a", "kto_tag": "0"},
        Unpaired((U,), A, False),
    ),
]


@pytest.mark.parametrize(
    ("fields", "train"),
    [
        ({"weight": 0}, False),
        ({"train": False}, False),
        ({"weight": 1, "train": False}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0, "train": True}, True),
        ({"weight": None, "train": None}, True),
    ],
)
def test_an_answer_may_be_only_read(fields: dict[str, object], train: bool) -> None:
    messages = dialogue("u", "a", "v", "b")
    row = {"messages": [messages[0], {**messages[1], **fields}, *messages[2:]]}
    record = parse_row(row, "chat", SPECIAL)
    assert record == Chat((U, Message("assistant", "a", train), user("v"), bot("b")))


def test_content_in_parts_of_text_is_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]
    assert parse_row({"messages": messages}, "chat") == Chat((user("a b"), bot("b")))
    assert parse_prompt({"messages": messages[:1]}) == (user("a b"),)


CALLS = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("kind", "row", "fields"),
    [
        (
            "chat",
            {"messages": [answer("a") | {"tool_calls": CALLS, "reasoning_content": "r"}]},
            {"tool_calls", "reasoning_content"},
        ),
        ("chat", {"messages": dialogue("u", "a"), "tools": CALLS}, {"tools"}),
        ("chat", {"prompt": "u", "completion": "a", "label": False}, {"label"}),
        ("chat", {"messages": [answer("a") | {"weight": 0, "name": "n"}], "id": 1}, set()),
        ("chat", {"messages": [{"role": "user", "content": "q", "weight": 0}, answer("a")]}, set()),
        (
            "chat",  # only answers are learnt
            {"messages": [{"role": "user", "content": "q", "train": True}, answer("a")]},
            {"train"},
        ),
        ("chat", {"messages": [answer("a") | {"tool_calls": []}], "tools": None}, set()),
        (
            "preference",
            {"chosen": [answer("a") | {"weight": 0}], "rejected": answer("b") | {"train": False}},
            {"train", "weight"},
        ),
        ("text", {"text": "a", "label": 1, "messages": [{"tool_calls": CALLS}]}, set()),
        ("unpaired", {"prompt": "u", "completion": "a", "label": 1, "weight": 2}, {"weight"}),
    ],
)
def test_fields_that_training_does_not_use(kind: Kind, row: object, fields: set[str]) -> None:
    assert unused_fields(row, kind) == fields


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (labelled(False), "unpaired"),
        ({"messages": dialogue("u", "a"), "kto_tag": True}, "unpaired"),
        (labelled("spam"), "chat"),
        ({"messages": dialogue("u", "a"), "label": 1}, "chat"),
        ({"text": "t", "label": 1}, "text"),
        ({"chosen": "a", "rejected": "b", **labelled(1)}, "preference"),
    ],
)
def test_a_kind_that_is_guessed(row: object, kind: Kind) -> None:
    assert kind_of(row) == kind


@pytest.mark.parametrize(("kind", "row", "expected"), GOOD)
def test_good_row(kind: Kind, row: dict[str, object], expected: Record) -> None:
    assert parse_row(row, kind, SPECIAL) == expected


def chat(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


def pair(chosen: object, rejected: object, **more: object) -> dict[str, object]:
    return {"chosen": chosen, "rejected": rejected, **more}


UM, AM = dialogue("u", "a")
# kind, row, reason, field, a fragment of the message
BAD: list[tuple[Kind, object, str, str | None, str]] = [
    ("text", ["text"], "wrong_type", None, "a JSON object, not a list"),
    ("text", None, "wrong_type", None, "not null"),
    ("text", {}, "missing_key", None, "{text}"),
    ("text", {"txt": 1, "\ud800": 2}, "missing_key", None, "['txt', '\\ud800']"),
    ("text", {"messages": []}, "missing_key", None, "looks like chat rows, for SFT"),
    ("text", {"chosen": "a", "prompt": "p"}, "missing_key", None, "preference rows, for DPO"),
    ("text", {"text": 3.5}, "wrong_type", "text", "must be a string, not a number"),
    ("text", {"text": None}, "wrong_type", "text", "not null"),
    ("text", {"text": " \n\u3000"}, "empty", "text", "is empty"),
    ("text", {"text": "a\ud800"}, "lone_surrogate", "text", "character 2 is a lone surrogate"),
    ("text", {"text": "a<|im_end|>"}, "special_token", "text", "'<|im_end|>'"),
    ("chat", {"text": "t"}, "missing_key", None, "looks like text rows, for pretraining"),
    ("chat", {"instruction": "u"}, "missing_key", None, "{instruction, input, output}"),
    ("chat", {"messages": None}, "missing_key", None, "['messages']"),
    ("chat", pair("a", "b", messages=[UM]), "missing_key", None, "preference rows, for DPO"),
    ("chat", {"messages": "hi"}, "wrong_type", "messages", "a list of messages, not a string"),
    ("chat", {"messages": []}, "no_messages", "messages", "holds no messages"),
    ("chat", chat(UM, 1), "wrong_type", "messages[1]", "a message object, not a number"),
    ("chat", chat({"role": "user"}), "missing_key", "messages[0]", "it has ['role']"),
    ("chat", chat({"role": 1, "content": ""}), "wrong_type", "messages[0].role", "a string"),
    ("chat", chat({"role": "bot", "content": ""}), "unknown_role", "messages[0].role", "'bot'"),
    (
        "chat",
        chat(UM, {"role": "tool", "content": "x"}),
        "tool_role",
        "messages[1].role",
        "Leave out conversations with tool calls",
    ),
    (
        "chat",
        chat({"role": "user", "content": [{"type": "text"}]}),
        "wrong_type",
        "messages[0].content[0].text",
        "must be a string, not null",
    ),
    (
        "chat",
        chat({"role": "user", "content": ["a"]}),
        "wrong_type",
        "messages[0].content[0]",
        "must be a part with a type, not a string",
    ),
    ("chat", chat({"role": "user", "content": []}), "empty", "messages[0].content", "is empty"),
    (
        "chat",
        chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}),
        "part_type",
        "messages[0].content[1].type",
        "'image' are not supported. Leave out rows with images",
    ),
    *(
        ("chat", chat(UM, {**AM, name: value}), "weight", f"messages[1].{name}", "must be")
        for name, values in (("weight", (2, 0.5, -1, True, "0")), ("train", (0, 1, "false")))
        for value in values
    ),
    ("chat", chat(UM, {**AM, "weight": 0}), "no_targets", "messages", "no answer is to be learnt"),
    (
        "chat",
        {"prompt": "u", "completion": {**AM, "train": False}},
        "no_targets",
        "completion",
        "Leave the row out",
    ),
    (
        "chat",
        {"conversations": [{"from": "human", "value": " "}]},
        "empty",
        "conversations[0].value",
        "is empty",
    ),
    ("chat", chat(UM, {**AM, "content": ""}), "empty", "messages[1].content", "is empty"),
    ("chat", chat(AM), "role_order", "messages[0].role", "'assistant' where 'user'"),
    ("chat", chat(UM, UM, AM), "role_order", "messages[1].role", "'user' where 'assistant'"),
    (
        "chat",
        chat(UM, {"role": "system", "content": "s"}),
        "role_order",
        "messages[1].role",
        "One system message may come first",
    ),
    (
        "chat",
        {"system": "s", "messages": dialogue("u", "a", system="s")},
        "role_order",
        "messages[0].role",
        "One system message may come first",
    ),
    ("chat", chat(UM), "no_assistant", "messages[0].role", "no assistant message"),
    ("chat", {"messages": dialogue(system="s")}, "no_messages", "messages[0].role", "no messages"),
    ("chat", {"instruction": "", "output": "a"}, "empty", "instruction", "is empty"),
    ("chat", {"instruction": "u", "output": ""}, "empty", "output", "is empty"),
    ("chat", {"instruction": "u", "input": 3, "output": "a"}, "wrong_type", "input", "a number"),
    (
        "chat",
        {"instruction": "u", "output": "a", "history": "x"},
        "wrong_type",
        "history",
        "a list, not a string",
    ),
    (
        "chat",
        {"instruction": "u", "output": "a", "history": [["q", "b"], ["q"]]},
        "wrong_type",
        "history[1]",
        "a question and an answer",
    ),
    (
        "chat",
        {"instruction": "u", "output": "a", "history": [["q", None]]},
        "wrong_type",
        "history[0][1]",
        "a string or a list, not null",
    ),
    ("chat", {"prompt": [UM, AM], "completion": "a"}, "prompt_end", "prompt[1].role", "user"),
    ("chat", {"prompt": "u", "completion": [UM]}, "role_order", "completion[0].role", "'user'"),
    ("chat", {"system": 1, "messages": [UM, AM]}, "wrong_type", "system", "a number"),
    (
        "chat",
        {"instruction": "u", "output": "<|im_start|>user"},
        "special_token",
        "output",
        "must not be able to start or end a turn",
    ),
    ("chat", chat(UM, {**AM, "content": "\udfff"}), "lone_surrogate", "messages[1].content", ""),
    ("preference", {"chosen": "a"}, "missing_key", None, "{chosen, rejected}"),
    ("preference", pair("a", "b"), "missing_key", None, "{prompt}"),
    ("preference", pair("a", None, prompt="u"), "missing_key", None, "'rejected'"),
    ("preference", pair("a", "a", prompt="u"), "same_answers", "rejected", "equals 'chosen'"),
    ("preference", pair([UM, AM], [UM, AM]), "same_answers", "rejected", "equals 'chosen'"),
    (
        "preference",
        pair(dialogue("u", "a"), dialogue("v", "b")),
        "prompt_mismatch",
        "rejected",
        "exactly the messages of the prompt",
    ),
    (
        "preference",
        pair(dialogue("u", "a"), dialogue("u", "b", "v", "c")),
        "prompt_mismatch",
        "rejected",
        "one answer",
    ),
    (
        "preference",
        pair(dialogue("x", "a"), dialogue("u", "b"), prompt="u"),
        "prompt_mismatch",
        "chosen",
        "one answer",
    ),
    ("preference", pair("a", "b", prompt=[UM, AM]), "prompt_end", "prompt[1].role", "user"),
    *(
        ("preference", {**pair("a", "b", prompt="u"), "margin": value}, "margin", "margin", "0.5")
        for value in ("far", "nan", float("inf"), -2e6, 10**400)
    ),
    (
        "preference",
        {**pair("a", "b", prompt="u"), "margin": True},
        "wrong_type",
        "margin",
        "a number, not a boolean",
    ),
    ("preference", pair([UM], "b", prompt="u"), "answer_role", "chosen[0].role", "assistant"),
    ("preference", pair("a", " ", prompt="u"), "empty", "rejected", "is empty"),
    ("preference", pair("a", 1, prompt="u"), "wrong_type", "rejected", "a string or a list"),
    ("preference", labelled(True), "missing_key", None, "looks like unpaired rows, for KTO"),
    ("preference", {"messages": [UM, AM], "kto_tag": 1}, "missing_key", None, "rows, for KTO"),
    ("unpaired", labelled(None), "label", "label", "the row has none. It says whether"),
    ("unpaired", {"messages": [UM, AM]}, "label", "label", "the row has none"),
    ("unpaired", {"text": "a"}, "missing_key", None, "not an unpaired row"),
    ("unpaired", pair("a", "b", prompt="u"), "missing_key", None, "preference rows, for DPO"),
    ("unpaired", {"label": True}, "missing_key", None, "{prompt, completion, label}"),
    ("unpaired", {"prompt": "u", "label": True}, "missing_key", None, "completion"),
    ("unpaired", labelled("good"), "label", "label", "must be true or false, not 'good'"),
    ("unpaired", labelled(-1), "label", "label", "not -1"),
    ("unpaired", labelled([True]), "label", "label", "true or false, or 1 or 0"),
    ("unpaired", {"messages": [UM, AM], "kto_tag": 2}, "label", "kto_tag", "not 2"),
    ("unpaired", {"messages": [UM, AM, UM], "label": 1}, "no_assistant", "messages", "the last"),
    ("unpaired", {**labelled(1), "prompt": [UM, AM]}, "prompt_end", "prompt[1].role", "user"),
    ("unpaired", {**labelled(1), "completion": UM}, "answer_role", "completion.role", "assistant"),
    ("unpaired", {**labelled(1), "completion": " "}, "empty", "completion", "is empty"),
]


@pytest.mark.parametrize(("kind", "row", "reason", "field", "fragment"), BAD)
def test_bad_row(kind: Kind, row: object, reason: str, field: str | None, fragment: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_row(row, kind, SPECIAL)
    error = caught.value.at("rows.jsonl", 3)
    assert (error.reason, error.field) == (reason, field)
    assert fragment in str(error)
    assert str(error).startswith("rows.jsonl:3:")
    str(error).encode()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "once"}, "once"),
        ({"prompt": "u", "system": "s"}, (system("s"), U)),
        ({"prompt": dialogue("u")}, (U,)),
        ({"messages": dialogue("u", "a", "v")}, (U, A, user("v"))),
        ({"conversations": [{"from": "human", "value": "u"}], "system": "s"}, (system("s"), U)),
        ({"instruction": "u", "input": "v"}, (user("u\nv"),)),
        ({"instruction": "u", "output": "a"}, (U,)),
    ],
)
def test_good_prompt(row: object, expected: object) -> None:
    assert parse_prompt(row) == expected


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ("once", "wrong_type", None),
        ({"text": "t"}, "missing_key", None),
        ({"prompt": ""}, "empty", "prompt"),
        ({"messages": dialogue("u", "a")}, "prompt_end", "messages[1].role"),
    ],
)
def test_bad_prompt(row: object, reason: str, field: str | None) -> None:
    with pytest.raises(DataError) as caught:
        parse_prompt(row)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_bad_row_has_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", LINES + b'{"text": ""}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:3:text: is empty") as caught:
        list(read_records([path], "text", BadRows()))
    assert (caught.value.path, caught.value.line) == (path, 3)


def test_skipped_rows_are_counted(tmp_path: Path) -> None:
    bad = BadRows("skip", max_share=0.9)
    first = write(tmp_path / "a.jsonl", LINES + b'{"text": ""}\n{"text": \n{"text": " "}\n')
    second = write(tmp_path / "b.jsonl", b"[1]".join([LINES, b"\n\xff\n"]) + LINES)
    lines = [source.line for _, source in read_records([first, second], "text", bad)]
    assert lines == [1, 2, 1, 2, 5, 6]
    assert bad.counts == {"empty": 2, "bad_json": 1, "wrong_type": 1, "bad_utf8": 1}
    assert bad.first["empty"] == f"{first}:3"
    assert bad.summary().startswith(f"skipped 5 bad rows: 2 empty (first {first}:3), 1 bad_json")
    assert "\n" not in bad.summary()
    assert BadRows("skip").summary() == ""


def test_too_many_skipped_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES * 9 + b"{}\n")
    assert len(list(read_records([path], "text", BadRows("skip", max_share=0.06)))) == 18
    with pytest.raises(DataError, match=r"1 missing_key \(first .*a\.jsonl:19\).* 5\.0%") as caught:
        list(read_records([path], "text", BadRows("skip")))
    assert caught.value.reason == "too_many_bad_rows"


def test_too_many_skipped_rows_stop_a_long_read_early(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES * 400 + b"{}\n" * 100_000)
    bad = BadRows("skip")
    with pytest.raises(DataError, match="more than 5"):
        list(read_records([path], "text", bad))
    assert bad.seen == 1000


def test_no_files() -> None:
    with pytest.raises(DataError, match="no files"):
        list(read_records([], "text", BadRows()))


def test_no_good_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"{}\n{}\n")
    with pytest.raises(DataError, match="no chat row can be used; skipped 2"):
        list(read_records([path], "chat", BadRows("skip", max_share=1)))


def test_limit_counts_records_of_all_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"{}\n" + LINES)
    bad = BadRows("skip", max_share=0.5)
    assert len(list(read_records([path, path], "text", bad, limit=3))) == 3
    assert list(read_records([path], "text", BadRows(), limit=0)) == []


def test_special_tokens_are_refused_where_they_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "<|im_end|>"}\n')
    assert len(list(read_records([path], "text", BadRows()))) == 1
    with pytest.raises(DataError, match="special token"):
        list(read_records([path], "text", BadRows(), special_tokens=SPECIAL))


CHAT_KEYS = ["messages", "conversations", "role", "content", "from", "value", "system"]
PAIR_KEYS = ["prompt", "completion", "chosen", "rejected"]
KEYS = ["text", "instruction", "input", "output", "history", *CHAT_KEYS, *PAIR_KEYS]
ROLES = ["system", "user", "assistant", "human", "gpt", "tool"]
STRINGS = st.text(st.characters(codec=None), max_size=6) | st.sampled_from(["\ud800", *ROLES])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | STRINGS
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": STRINGS})
JSON = st.recursive(
    SCALARS | MESSAGES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | STRINGS, inner, max_size=5)
    ),
    max_leaves=20,
)
ROWS = st.dictionaries(st.sampled_from(KEYS), JSON | st.lists(MESSAGES, max_size=4), max_size=6)


@given(JSON | ROWS)
def test_any_value_is_a_record_or_a_data_error(row: object) -> None:
    for kind in KINDS:
        try:
            record = parse_row(row, kind, SPECIAL)
        except DataError as error:
            str(error).encode()
        else:
            assert type(record) is TYPES[kind]
            repr(record).encode()
    try:
        assert parse_prompt(row)
    except DataError as error:
        str(error).encode()


LINE = ROWS.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=20)
FILES = st.lists(LINE, max_size=5).map(b"\n".join)


@given(FILES | FILES.map(gzip.compress) | FILES.map(lambda data: gzip.compress(data)[:-4]))
def test_any_file_is_records_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", data)
    for kind in KINDS:
        for bad in (BadRows(), BadRows("skip", max_share=1)):
            try:
                assert list(read_records([path], kind, bad))
            except DataError as error:
                str(error).encode()


def test_import_is_light() -> None:
    code = "import sys, minigpt.data.formats; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_load_prompts(write: Callable[..., Path]) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "Once ", "id": 5},
        {"prompt": "q", "system": "s"},
        {"messages": [{"role": "user", "content": "q"}]},
        {"instruction": "q", "input": "i", "output": "not sent"},
    ]
    user = Message("user", "q")
    path = write(rows)
    contents = ["Once ", (Message("system", "s"), user), (user,), (Message("user", "q\ni"),)]
    assert load_prompts(path) == [
        Prompt(content, rows[number], number, (str(path), number + 1))
        for number, content in enumerate(contents)
    ]


def test_bad_prompts_are_left_out_and_counted_where_rows_may_be(write: Callable[..., Path]) -> None:
    bad = BadRows("skip", max_share=0.5)
    path = write([{"prompt": "a"}, {"prompt": 3}, {"prompt": "b"}, {"prompt": "c"}])
    prompts = load_prompts(path, bad=bad, limit=3)
    assert [(p.content, p.number, p.source[1]) for p in prompts] == [("a", 0, 1), ("b", 1, 3)]
    assert (bad.seen, bad.counts.total()) == (3, 1)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "t"},
        {"prompt": " "},
        {"prompt": 3},
        {"messages": [{"role": "assistant", "content": "a"}]},
        ["q"],
    ],
)
def test_a_bad_prompt_is_named(write: Callable[..., Path], row: object) -> None:
    path = write([{"prompt": "fine"}, row])
    with pytest.raises(DataError, match=r"rows\.jsonl:2") as caught:
        load_prompts(path)
    assert (caught.value.path, caught.value.line) == (path, 2)


ROW = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(st.lists(ROW, min_size=1), st.sampled_from([None, 1]), st.integers(1, 9))
def test_an_array_is_read_item_by_item(rows: list[Any], indent: int | None, block: int) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt.data.formats._BUFFER", block)
        try:
            file = write(Path(folder, "a.json"), text.encode())
        except UnicodeEncodeError:  # a lone surrogate
            file = write(Path(folder, "a.json"), json.dumps(rows).encode())
        assert list(iter_rows(file)) == list(enumerate(rows, 1))


@given(
    damage.damaged_bytes(json.dumps([{"text": "one"}, [1, "春"], 25]).encode()), st.integers(1, 9)
)
def test_a_damaged_array_is_refused_as_json_refuses_it(data: bytes, block: int) -> None:
    try:
        expected = json.loads(data)
    except (ValueError, RecursionError):
        expected = None
    if not isinstance(expected, list) or not expected or not data.lstrip().startswith(b"["):
        return
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt.data.formats._BUFFER", block)
        file = write(Path(folder, "a.json"), data)
        assert repr(list(iter_rows(file))) == repr(list(enumerate(expected, 1)))


@pytest.mark.parametrize(
    ("head", "body", "tail", "zip_it"),
    [
        (b"", b"\0", b"", True),
        (b'{"text": "', b"x", b'"}', False),
        (b"[", b" ", b"]", True),
        (b"[[", b"0,", b"0]]", False),
        (b'["', b"x", b'"]', False),
        (b'{"text": "one"}\n', b"x", b"\n", True),
    ],
)
def test_what_has_no_end_is_refused_in_bounded_memory(
    tmp_path: Path, head: bytes, body: bytes, tail: bytes, zip_it: bool
) -> None:
    """Half a gigabyte in a line, or packed into a file that is a thousandth of that."""
    file = tmp_path / ("a.jsonl.gz" if zip_it else "a.jsonl")
    with gzip.open(file, "wb", 1) if zip_it else file.open("wb") as out:
        out.write(head)
        for _ in range(32):
            out.write(body * (16 * MEGABYTE // len(body)))
        out.write(tail)
    code = (
        "import sys; from pathlib import Path; from minigpt.machine import peak_memory\n"
        "from minigpt.data.formats import iter_rows; from minigpt.errors import DataError\n"
        "try: sys.exit(f'{sum(1 for _ in iter_rows(Path(sys.argv[1])))} rows')\n"
        "except DataError as error: print(error)\n"
        "print(peak_memory()['peak_rss_mb'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    problem, peak_megabytes = done.stdout.splitlines()
    assert "bytes" in problem or "no rows" in problem, problem
    assert problem.startswith(f"{file}")
    assert int(peak_megabytes) < 500


@pytest.mark.parametrize("blank", [b"\0", b"\n", b" "])
def test_what_holds_no_row_is_not_read_for_hours(
    blank: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LARGEST_BLANK", 4 * MEGABYTE)
    file = tmp_path / "a.jsonl.bz2"
    row = b'{"text": "one"}\n'
    file.write_bytes(bz2.compress(row + blank * (3 * MEGABYTE) + b"\n" + row))
    assert len(list(iter_rows(file))) == 2
    file.write_bytes(bz2.compress(row + blank * (8 * MEGABYTE)))
    with pytest.raises(DataError, match=r"a\.jsonl\.bz2.*4,194,304 bytes and more hold no row"):
        list(iter_rows(file))


@damage.counts
def test_damaged_files_are_read_or_refused(tmp_path: Path, count: int) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "one"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    ]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    damaged = st.one_of(
        *(damage.damaged_json(row) for row in rows),
        damage.damaged_json(rows),
        *(damage.damaged_bytes(data) for data in (lines, json.dumps(rows).encode(), zipped(lines))),
    )

    table = b'text,messages\n"a, b",\n,"[{""role"": ""user"", ""content"": ""c""}]"\n'
    named = [("rows", damaged), ("rows.txt", damage.damaged_bytes(b"one\n\ntwo\nthree\n"))]
    named += [("rows.csv", damage.damaged_bytes(table))]
    named += [("rows.tsv", damage.damaged_bytes(table.replace(b",", b"\t")))]
    packers: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("rows.xz", lzma.compress),
        ("rows.bz2", bz2.compress),
    ]
    with suppress(ImportError):
        packers.append(("rows.zst", import_module("zstandard").compress))
    for name, pack in packers:
        named += [(name, damage.damaged_bytes(pack(lines)))]
    examples = [one.map(lambda data, name=name: (name, data)) for name, one in named]

    def read(example: tuple[str, bytes]) -> None:
        name, data = example
        file = write(tmp_path / name, data)
        for kind in (*KINDS, None):
            with suppress(DataError):
                list(read_records([file], kind, BadRows("skip", max_share=1)))
        load_prompts(file)

    damage.assert_read_or_refused(count, st.one_of(examples), read)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'text,messages\na,"' + b"[" * 9999 + b'"\n'),
        ("a.csv", b'text\n"' + b"x\n" * 200),
        ("a.txt", b"\n\na\n" + b"x\n" * 200),
    ],
)
def test_tables_and_texts_without_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.setattr("minigpt.data.tables.LARGEST_CELL", 20_000 if b"[" in content else 300)
    with pytest.raises(DataError, match=rf"{name}:\d+: "):
        list(iter_rows(write(tmp_path / name, content)))


def test_a_completion_outlives_a_row_that_json_cannot_hold() -> None:
    row: dict[str, object] = {"prompt": "春", "note": "\ud800"}
    assert json.loads(completed(row, "眠")) == {**row, "completion": "眠"}
    assert completed(row, "眠").decode() == (
        '{"prompt": "春", "note": "\\ud800", "completion": "眠"}\n'
    )
    row["again"] = row
    assert json.loads(completed(row, "眠")) == {"completion": "眠"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.md", b"# Title\n\nSome text.\n", r"is plain text.*Rename it to \.txt"),
        ("notes", "从前有一座山".encode("gbk"), "is plain text"),
        ("a.jsonl", b"\0" * 4 + b"\0" * 253 + b"ustar", "is a tar archive"),
        ("a.jsonl", b"\x40\1\0\0\0\0\0\0" + b'{"w"', "is a safetensors model"),
        ("a.jsonl", b"\x80\x04\x95abc", "is a pickle"),
        ("a.jsonl", b"\x04\x22M\x18abc", "is compressed by lz4"),
        ("a.mp3", b"ID3\x03abc", "is an audio file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r"of Git LFS.*git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("a.jsonl", b"\n<!DOCTYPE html>\n<html>", "is a web page"),
        ("a.csv", BOM + b"<html lang='zh'>\n", "is a web page"),
        ("a.feather", b"FEA1\0\0\0\0", "is a Feather file of version 1"),
        ("a.parquet", b"PARE\x15abc", r"is no \.parquet file, by what it begins with"),
        ("a.xlsx", "问,答\n".encode("gbk"), r"is no \.xlsx file, by what it begins with"),
        ("a.gif", b"GIF89a\1\0\1\0", "is binary, of a kind that is not read"),
        ("train.log", "训练 \x1b[1m1\x1b[0m\f\n".encode(), "is plain text"),
        ("notes", "从前".encode("utf-16"), "is plain text"),
    ],
)
def test_a_file_that_is_no_data_is_named(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        list(iter_rows(write(tmp_path / name, content)))


def test_a_text_may_be_the_source_of_a_web_page(tmp_path: Path) -> None:
    path = write(tmp_path / "page.txt", b"<!DOCTYPE html>\n")
    assert [row for _, row in iter_rows(path)] == [{"text": "<!DOCTYPE html>"}]
