from __future__ import annotations

import csv
import io
import re
from pathlib import Path, PurePath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.data import tables
from minigpt.data.formats import BadRows, Kind, iter_rows, read_records, scan_rows
from minigpt.data.tables import table_rows, text_rows
from minigpt.errors import DataError

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=9)


def texts(data: str) -> list[tuple[int, str]]:
    rows = text_rows(PurePath("a.txt"), io.BytesIO(data.encode()))
    return [(line, row["text"]) for line, row in rows]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("one\ntwo\r\n", [(1, "one"), (2, "two")]),
        ("one", [(1, "one")]),
        ("\n\none\ntwo\n\n", [(3, "one\ntwo")]),
        ("one\n\n", [(1, "one")]),
        ("a\nb\n\n\nc\n \nd\ne", [(1, "a\nb"), (5, "c"), (7, "d\ne")]),
        ("", []),
        (" \n\n", []),
    ],
)
def test_documents_of_a_text(data: str, expected: list[tuple[int, str]]) -> None:
    assert texts(data) == expected


def test_blank_lines_are_looked_for_in_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LOOKED_AT", 4)
    assert texts("one\ntwo\nthree\n\nfour") == [(1, "one"), (2, "two"), (3, "three"), (5, "four")]


def test_a_text_that_is_not_utf8() -> None:
    with pytest.raises(DataError, match="byte 3 of the line is neither UTF-8") as caught:
        list(text_rows(PurePath("a.txt"), io.BytesIO("one\nab春".encode("gbk"))))
    assert caught.value.line == 2


def rows(data: str, delimiter: str = ",") -> list[tuple[int, Any]]:
    return list(table_rows(io.BytesIO(data.encode()), delimiter, {}))


def test_rows_of_a_table() -> None:
    data = 'prompt,completion,note\n"a ""b"",\nc",d,\n\ne,f\n'
    assert rows(data) == [
        (2, {"prompt": 'a "b",\nc', "completion": "d"}),
        (5, {"prompt": "e", "completion": "f"}),
    ]
    assert rows("text\tnote\none, two\t3\n", "\t") == [(2, {"text": "one, two", "note": "3"})]
    assert rows("text\n") == []


@pytest.mark.parametrize("other", [";", "\t", ","])
def test_the_first_line_says_what_parts_the_cells(other: str) -> None:
    """Excel writes semicolons where a comma marks decimals."""
    data = f"question{other}answer\nWhat?{other}It is so\n"
    expected = [(2, {"question": "What?", "answer": "It is so"})]
    assert rows(data) == rows(data, "\t") == expected


def test_another_delimiter_within_names_parts_nothing() -> None:
    assert rows("a;b,c\n1;2,3\n") == [(2, {"a;b": "1;2", "c": "3"})]


@pytest.mark.parametrize(
    ("name", "description"), [("a.docx", "a document (.docx)"), ("a.zip", "a ZIP archive")]
)
def test_archives_are_named_for_what_they_are(name: str, description: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(DataError, match=re.escape(description)):
        list(scan_rows(path))


def test_cells_that_hold_messages() -> None:
    message = '[{""role"": ""user"", ""content"": ""Hi""}]'
    ((_, row),) = rows(f'messages,text\n"{message}","[1]"\n')
    assert row == {"messages": [{"role": "user", "content": "Hi"}], "text": "[1]"}
    ((_, error),) = rows("messages\n[1\n")
    assert isinstance(error, DataError)
    assert "the cell of messages is not JSON" in str(error)


@pytest.mark.parametrize(
    ("data", "line", "problem"),
    [
        ("a,a\n", 1, "the first line must name each column once"),
        ("a,\n", 1, "the first line must name each column once"),
        ("", 1, "the first line must name each column once"),
        ('a,b\nx,"y\n', 2, "unexpected end of data"),
        ('a,b\nx,"y"z\n', 2, "expected after"),
        ("a,b\rx,y\r", 1, "lines end with CR alone. Save it with the line ends"),
    ],
)
def test_a_table_that_cannot_be_read(data: str, line: int, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        rows(data)
    assert caught.value.line == line


def test_a_row_with_too_many_cells_leaves_the_others() -> None:
    first, second = rows("a,b\n1,2,3\n4,5\n")
    assert isinstance(first[1], DataError)
    assert "3 cells stand under 2 columns" in str(first[1])
    assert second == (3, {"a": "4", "b": "5"})


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_what_csv_writes_is_read(cells: list[tuple[str, str]]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerows([("one", "two"), *cells])
    expected = [{n: c for n, c in zip(("one", "two"), row, strict=True) if c} for row in cells]
    assert [row for _, row in rows(out.getvalue())] == expected


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("poems.txt", "one\ntwo\n", "text"),
        ("rows.csv", "text\none\ntwo\n", "text"),
        ("qa.tsv", "question\tanswer\nHi?\tHello.\nBye?\tBye.\n", "chat"),
    ],
)
def test_the_one_reader_reads_them(name: str, data: str, kind: Kind, tmp_path: Path) -> None:
    (tmp_path / name).write_text(data)
    assert len(list(read_records([tmp_path / name], kind, BadRows()))) == 2
    (tmp_path / name).write_text("")
    with pytest.raises(DataError):
        list(iter_rows(tmp_path / name))


def test_a_bad_row_of_a_table_comes_as_its_error(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\none\ntwo,three\nfour\n")
    scanned = list(scan_rows(tmp_path / "rows.csv"))
    assert [line for line, _ in scanned] == [2, 3, 4]
    assert isinstance(scanned[1][1], DataError)
