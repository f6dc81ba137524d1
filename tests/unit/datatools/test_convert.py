from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from columnar_files import arrow, parquet, spreadsheet

from minigpt.__main__ import main

ROWS = [{"ask": "Hi?", "reply": "Hello."}, {"ask": "春?", "reply": "Yes."}]
RENAMED = [{"prompt": row["ask"], "completion": row["reply"]} for row in ROWS]


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def convert(*arguments: object) -> int:
    columns = ("--columns", "ask=prompt", "reply=completion")
    return main(["data", "convert", *map(str, arguments), *columns])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.parquet", lambda path: parquet(path, ROWS)),
        ("rows.arrow", lambda path: arrow(path, ROWS)),
        ("stream.arrow", lambda path: arrow(path, ROWS, stream=True)),
        ("rows.xlsx", lambda path: spreadsheet(path, ROWS)),
        ("rows.csv", lambda path: path.write_text("ask,reply\nHi?,Hello.\n春?,Yes.\n")),
        ("rows.jsonl", lambda path: path.write_text("\n".join(map(json.dumps, ROWS)))),
    ],
)
def test_a_file_becomes_jsonl(name: str, write: Any, tmp_path: Path) -> None:
    write(tmp_path / name)
    out = tmp_path / "out.jsonl"
    assert convert(tmp_path / name, out) == 0
    assert [row for row in written(out) if row] == RENAMED


def test_cells_of_a_spreadsheet_may_hold_messages(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    messages = [{"role": "user", "content": "Hi?"}]
    book = openpyxl.Workbook()
    for cell in ("messages", json.dumps(messages)):
        book.active.append((cell,))
    book.save(tmp_path / "rows.xlsx")
    assert convert(tmp_path / "rows.xlsx", tmp_path / "out.jsonl") == 0
    assert written(tmp_path / "out.jsonl") == [{"messages": messages}]


def test_what_utf8_cannot_hold_stays_an_escape(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"ask": "\\ud800", "reply": "Hello."}')
    assert convert(tmp_path / "rows.jsonl", tmp_path / "out.jsonl") == 0
    assert written(tmp_path / "out.jsonl") == [{"prompt": "\ud800", "completion": "Hello."}]


def test_a_key_that_no_row_has_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows.jsonl").write_text('{"ask": "Hi?"}\n{"ask": "春?", "answer": "Yes."}')
    assert convert(tmp_path / "rows.jsonl", tmp_path / "out.jsonl") == 0
    assert "no row has the key reply." in caplog.text
    assert written(tmp_path / "out.jsonl")[1] == {"prompt": "春?", "answer": "Yes."}


def test_patterns_stand_for_their_files(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
    assert convert(tmp_path / "*.jsonl", tmp_path / "out") == 0
    assert written(tmp_path / "out") == RENAMED


def test_several_files_become_one(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
    assert convert(tmp_path / "0.jsonl", tmp_path / "1.jsonl", tmp_path / "out.jsonl") == 0
    assert written(tmp_path / "out.jsonl") == RENAMED


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.xlsx", "rows.jsonl"])
def test_a_damaged_file_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("openpyxl")
    (tmp_path / name).write_bytes(b"PAR1\x15 no rows" * 9)
    assert convert(tmp_path / name, tmp_path / "out.jsonl") == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_what_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    assert convert(tmp_path / "rows.jsonl", tmp_path / "out.jsonl") == 2
    assert "exists and is left alone" in capsys.readouterr().err
    assert main(["data", "convert", "a", "b", "--columns", "ask"]) == 2
    assert "--columns: must be OLD=NEW, but is 'ask'" in capsys.readouterr().err
