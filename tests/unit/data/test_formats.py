from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

import pytest

from minigpt.data.formats import iter_rows
from minigpt.data.records import BadRows, Source, Text, read_records
from minigpt.errors import DataError


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
        (LINES + '{"text": "春眠"}'.encode("gbk"), "bad_utf8", 3, "iconv -f GBK -t UTF-8"),
        ('[\n{"text": "春"}]'.encode("gbk"), "bad_utf8", 2, "byte 11"),
        ('{"text": "春"}\n'.encode("utf-16"), "bad_utf8", 1, "iconv -f UTF-16"),
        (b"[" * 100_000, "bad_json", 1, "nested too deeply"),
        (b'{"a":' * 100_000, "bad_json", 1, "nested too deeply"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "bad_json", 1, "too many digits"),
        (zipped(LINES * 500)[:-9], "bad_gzip", None, "cut off or damaged"),
        (zipped(LINES)[:12] + b"\xff\xff\xff", "bad_gzip", None, "cut off or damaged"),
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
    with pytest.raises(DataError, match="gzip"):
        list(iter_rows(write(tmp_path / "plain.gz", LINES)))
