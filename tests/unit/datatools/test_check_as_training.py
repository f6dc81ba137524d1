"""`data check` says of each kind of damage what `fit` says, because both read by one reader."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minigpt.data import tokenizer as tokenizers
from minigpt.data.store import Limits, TokenStore, open_store
from minigpt.datatools.check import HINTS, Checker, Findings
from minigpt.errors import DataError


def chat(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False)


ROWS = [chat(f"第{number}个问题是什么？", f"这是第{number}个回答。") for number in range(12)]
TEXT = "\n".join(ROWS)
UTF8 = TEXT.encode()
TRADITIONAL = [
    chat(f"{number} 這個問題為什麼會這樣？", "因為時間過得很快，我們還沒說。")
    for number in range(12)
]
ARRAY = [json.loads(row) for row in ROWS]


def joined(rows: list[str], encoding: str) -> bytes:
    return "\n".join([*rows, ""]).encode(encoding)


class Damage(NamedTuple):
    """A file, the rows that are read of it, and the line of the first that is not."""

    data: bytes
    good: int = 12
    bad_line: int | None = None


DAMAGE = {
    "clean": Damage(UTF8),
    "GB18030": Damage(TEXT.encode("gb18030")),
    "GB18030, traditional": Damage(joined(TRADITIONAL, "gb18030")),
    "GB18030, marked": Damage(("\ufeff" + TEXT).encode("gb18030")),
    "GB18030 behind UTF-8": Damage(joined(ROWS[:6], "utf-8") + joined(ROWS[6:], "gb18030")),
    "UTF-8 behind GB18030": Damage(joined(ROWS[:9], "gb18030") + joined(ROWS[9:], "utf-8")),
    "a line of GB18030 and UTF-8": Damage(joined([*ROWS[:11], chat("联通", "a")], "gb18030")),
    "GB18030, indented array": Damage(
        json.dumps(ARRAY, indent=1, ensure_ascii=False).encode("gb18030")
    ),
    "GB18030, array in a line": Damage(json.dumps(ARRAY, ensure_ascii=False).encode("gb18030")),
    "UTF-16": Damage(TEXT.encode("utf-16")),
    "UTF-16 without a mark": Damage(TEXT.encode("utf-16-be")),
    "UTF-32": Damage(TEXT.encode("utf-32")),
    "mark": Damage(codecs.BOM_UTF8 + UTF8),
    "mark in the middle": Damage(joined([*ROWS[:5], "\ufeff" + ROWS[5], *ROWS[6:]], "utf-8")),
    "Ctrl-Z": Damage(UTF8.replace(b"\n", b"\r\n") + b"\r\n\x1a"),
    "NUL tail": Damage(UTF8 + b"\n" + bytes(512)),
    "NUL hole": Damage(UTF8.replace(b"\n", b"\n" + bytes(999), 1)),
    "NUL": Damage(UTF8.replace(b"5", b"\0")),
    "ESC": Damage(UTF8.replace(b"5", b"\x1b[0m")),
    "VT": Damage(UTF8.replace(b"5", b"\x0b")),
    "escaped control character": Damage(UTF8.replace(b"5", b"\\u0001")),
    "flipped byte": Damage(UTF8.replace("4个".encode(), b"4\xe4\xff\xaa"), 11, 5),
    "cut off": Damage(UTF8[:-9], 11, 12),
    "Big5": Damage(joined(ROWS, "utf-8") + TRADITIONAL[0].encode("big5"), 12, 13),
    "Latin-1": Damage(joined(ROWS, "utf-8") + chat("café", "très").encode("latin-1"), 12, 13),
    "empty answer": Damage(joined([*ROWS, chat("a", " ")], "utf-8"), 12, 13),
    "answer of a control character": Damage(joined([*ROWS, chat("a", "\0")], "utf-8"), 13),
    "raw control character": Damage(
        joined(ROWS, "utf-8") + chat("a", "b").encode().replace(b"b", b"\x07"), 12, 13
    ),
}
READ_OTHERWISE = ("GB18030", "UTF", "mark", "a line of GB18030")  # which training says


@pytest.mark.parametrize("kind", DAMAGE)
def test_check_says_what_training_says(
    kind: str, tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, good, bad_line = DAMAGE[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(data) if len(kind) % 2 else data)
    tokenizer = tokenizers.load(tokenizer_dir)

    def opened(limits: Limits) -> TokenStore:
        return open_store(path, "chat", tokenizer, limits, tmp_path / "cache")

    findings = Findings()
    Checker(findings, "chat", tokenizer=tokenizer).check(path)
    errors = [error for error in findings.listed if error.reason not in HINTS]
    if bad_line:
        with pytest.raises(DataError) as caught:
            opened(Limits())
        assert str(errors[0]) == str(caught.value)
        assert caught.value.line == bad_line
        store = opened(Limits(on_bad_row="skip", max_bad_share=0.5))
        assert store.meta["skipped"] == {errors[0].reason: len(errors)}
    else:
        assert not errors
        store = opened(Limits())
    assert len(store) == good
    hints = [f"{path}: {e.problem}" for e in findings.listed if e.reason in ("encoding", "bom")]
    assert set(hints) <= {record.message for record in caplog.records}
    assert bool(hints) == kind.startswith(READ_OTHERWISE)


@pytest.mark.parametrize("kind", DAMAGE)
def test_no_good_row_is_lost_in_mending(kind: str, tmp_path: Path, minigpt: Any) -> None:
    data, good, bad_line = DAMAGE[kind]
    path, fixed = tmp_path / "rows.jsonl", tmp_path / "fixed.jsonl"
    path.write_bytes(data)
    assert minigpt("data", "check", path, "--fix", fixed).status == (2 if bad_line else 0)
    lines = fixed.read_text("utf-8").splitlines()
    lost = kind == "answer of a control character"  # which the mended copy leaves out
    assert len(lines) == good - lost
    if kind.startswith(READ_OTHERWISE) and "traditional" not in kind:
        expected = [*ROWS[:11], chat("联通", "a")] if kind.startswith("a line") else ROWS
        assert list(map(json.loads, lines)) == list(map(json.loads, expected))
    outcome = minigpt("data", "check", fixed)
    assert outcome.out == f"{len(lines)} rows checked: 0 errors, 0 hints\n"


def test_a_large_file_in_another_encoding(tmp_path: Path, minigpt: Any) -> None:
    """Its letters begin late, lines go over the borders of blocks, and one is damaged."""
    plain = [json.dumps({"text": "x" * 999}) for _ in range(300)]
    rows = [
        json.dumps({"text": f"{n} " + "我们说的话" * 500}, ensure_ascii=False) for n in range(99)
    ]
    data = joined(plain, "ascii") + joined(rows, "gb18030")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data + b'{"text": "' + UTF8[20:60].replace(b"\xe7", b"\xff") + b'"}\n')
    outcome = minigpt("data", "check", path)
    assert outcome.status == 2
    assert f"hint: {path}:301: read as GB18030: 99 lines, from line 301 on." in outcome.out
    assert f"error: {path}:400: " in outcome.out
    assert "[bad_utf8]" in outcome.out
