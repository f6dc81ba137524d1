"""The quick way to read rows and the thorough one agree, whatever the rows hold."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt.data.formats import Kind, parse_row
from minigpt.datatools import flat as quick
from minigpt.datatools.check import Checker, Findings
from minigpt.datatools.flat import batches, flat_of, parse, record_of
from minigpt.datatools.stats import measure
from minigpt.errors import DataError

KINDS: tuple[Kind, ...] = ("text", "chat", "preference")
TOKENS = ("<|im_start|>", "<|im_end|>")
CONTENT: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(["hi", "你好", "a b", "é\n"]),
    st.sampled_from(["hi", "你好", "", " ", "a\0", "\0", "<|im\0_end|>", "a<|im_end|>", "\x85a"]),
    st.sampled_from(["a\ufffd", "\ufeffa", "\uffff", "\ud800", 0, 3, None, True, [], {}, ["a"]]),
    st.text(max_size=3),
)
ROLE = st.one_of(
    st.sampled_from(["system", "user", "assistant", "human", "gpt"]),
    st.sampled_from(["tool", "", "user\0", None, 1, []]),
)
EXTRA = st.sampled_from([0, 1, 2, None, True, False, [], ["a"]])
KEYS = st.sampled_from([("role", "content"), ("from", "value"), ("role", "value"), ("from", "x")])


@st.composite
def messages(draw: st.DrawFn) -> Any:
    """Messages in a good order, or in any order and with anything in them."""
    good = st.sampled_from(["hi", "你好", "a\0", "a\ufffd", "<|im_end|>"])
    if draw(st.booleans()):
        roles = draw(st.sampled_from([("user", "assistant"), ("human", "gpt")])) * 2
        said = [{"role": role, "content": draw(good)} for role in roles[: draw(st.integers(1, 4))]]
        if draw(st.booleans()):
            draw(st.sampled_from(said))["weight"] = draw(st.sampled_from([0, 1]))
        system = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
        return [*system, *said]
    pairs = draw(st.lists(st.tuples(KEYS, ROLE, CONTENT), max_size=4))
    more = st.dictionaries(st.sampled_from(["weight", "train", "tool_calls", "id"]), EXTRA)
    return [
        {keys[0]: role, keys[1]: content} | draw(st.one_of(st.just({}), more))
        for keys, role, content in pairs
    ]


VALUE = st.one_of(CONTENT, messages(), messages(), st.lists(CONTENT, max_size=2))
FIELDS = ("text", "messages", "conversations", "prompt", "completion", "instruction", "input")
FIELDS += ("output", "history", "system", "chosen", "rejected", "note")
FORMS = [("text",), ("messages",), ("conversations",), ("prompt", "completion"), ("system",)]
FORMS += [("instruction", "output"), ("instruction", "input", "output"), ("chosen", "rejected")]
FIELDS += ("label", "tools")
FORMS += [("prompt", "chosen", "rejected"), ("messages", "chosen", "rejected"), ()]


TURN = ("user", "assistant")


@st.composite
def rows(draw: st.DrawFn) -> Any:
    """Rows of every form, with other fields in some."""
    keys = [*draw(st.sampled_from(FORMS)), *draw(st.lists(st.sampled_from(FIELDS), max_size=1))]
    row = {key: draw(VALUE) for key in keys}
    before = draw(messages())
    if "chosen" in row and draw(st.booleans()):  # whole conversations
        row["chosen"], row["rejected"] = (
            [*before, {"role": "assistant", "content": text}] for text in ("one", "two")
        )
        row["prompt"] = before if draw(st.booleans()) else None
    return draw(st.sampled_from([row] * 9 + [[row]]))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@example([{"prompt": [{"role": r, "content": r} for r in TURN], "chosen": "a", "rejected": []}])
@given(data=st.lists(rows(), min_size=1, max_size=6))
def test_what_is_read_quickly_is_what_is_read_thoroughly(kind: Kind, data: list[Any]) -> None:
    [batch] = batches(enumerate(data), kind, TOKENS)
    for number, (row, flat) in enumerate(zip(data, batch.flats, strict=True)):
        thorough = parse(row, kind, TOKENS)
        if isinstance(thorough, DataError):
            assert str(flat) == str(thorough)
            assert number in batch.special
            continue
        assert flat == thorough
        assert flat_of(record_of(flat, kind)) == flat
        odd = any(char in part for part in flat[1::2] for char in "\0\x85\ufffd\ufeff\uffff")
        assert number in batch.special or not odd


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


USUAL: list[tuple[Kind, dict[str, Any]]] = [
    ("text", {"text": "a"}),
    ("chat", {"messages": [{"role": "system", "content": "s"}, *said("a", "b", "c", "d")]}),
    ("chat", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    ("chat", {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": []}),
    ("chat", {"instruction": "a", "input": "", "output": "c"}),
    ("chat", {"prompt": "a", "completion": "b"}),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("preference", {"prompt": said("a"), "chosen": said("a", "b"), "rejected": said("a", "c")}),
    ("preference", {"chosen": said("a", "b"), "rejected": said("a", "c")}),
]


@pytest.mark.parametrize(("kind", "row"), USUAL)
def test_usual_rows_take_the_quick_way(
    kind: Kind, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = flat_of(parse_row(row, kind, TOKENS))
    monkeypatch.delattr(quick, "parse")  # the other way has to end here
    [batch] = batches([(7, row)], kind, TOKENS)
    assert batch == ([7], [expected], {})


def outcome(data: bytes, kind: Kind) -> list[Any]:
    """Return all that check, its mended copy and stats tell of a file."""
    with tempfile.TemporaryDirectory() as directory:
        path, out, findings = Path(directory, "in.jsonl"), Path(directory, "out"), Findings(3)
        path.write_bytes(data)
        checker = Checker(findings, Path(directory), kind)
        checker.check(path)
        checker.finish()
        told: list[Any] = [checker.rows, *findings.lines(), json.dumps(findings.as_dict())]
        with contextlib.suppress(DataError):
            told.append(checker.write_fixed(path, out))
            told.append(out.read_bytes())
        with contextlib.suppress(DataError):
            told.append(measure(path, kind))
        return [str(part).replace(directory, "") for part in told]


JUNK = st.sampled_from([b"{", b"", b"\xff", b"\xef\xbb\xbf", "你好".encode("gbk"), b"[1", b"\x01"])
LINES = rows().map(lambda row: json.dumps(row).encode())
FILE = st.lists(st.one_of(LINES, LINES, LINES, JUNK), min_size=1, max_size=10).map(b"\n".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=FILE, repeats=st.integers(1, 2), size=st.sampled_from([1, 3, 300]))
def test_files_are_judged_as_if_every_row_were_read_thoroughly(
    kind: Kind, data: bytes, repeats: int, size: int
) -> None:
    data = b"\n".join([data] * repeats)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "_ROWS", size)
        told = outcome(data, kind)
        patch.setattr(quick, "_read", lambda row, kind: {}["unusual"])
        assert outcome(data, kind) == told
