"""Training and the tools read spreadsheets, Parquet and Arrow as they read JSONL."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import damage
import pytest
from columnar_files import arrow, parquet, spreadsheet
from transformers import PreTrainedTokenizerFast

from minigpt.data import columnar
from minigpt.data.formats import BadRows, expand_files, iter_rows, read_records
from minigpt.data.store import Limits, open_store
from minigpt.errors import DataError

ROWS = [{"question": f"{number}?", "answer": f"春{number}"} for number in range(200)]
SHEET, STRINGS = "xl/worksheets/sheet1.xml", "xl/sharedStrings.xml"
MAIN = b'"http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
STRINGS_TYPE = (
    b'<Override PartName="/xl/sharedStrings.xml" ContentType="application/'
    b'vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"/>'
)
INLINE = b'<row><c t="inlineStr"><is><t>%s</t></is></c></row>'
FORMS: dict[str, Callable[[Path, Any], None]] = {
    "rows.parquet": partial(parquet, row_group_size=70),
    "rows.arrow": arrow,
    "rows.feather": partial(arrow, stream=True),
    "rows.xlsx": spreadsheet,
}


@pytest.mark.parametrize("name", FORMS)
def test_training_reads_the_rows(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = tmp_path / "rows.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    FORMS[name](tmp_path / name, ROWS)
    expected = open_store(plain, "chat", tokenizer, Limits(), tmp_path / "cache")
    limits = Limits(on_bad_row="skip")  # of the row that is empty
    store = open_store(tmp_path / name, "chat", tokenizer, limits, tmp_path / "cache")
    assert store.tokens[:].tolist() == expected.tokens[:].tolist()
    first = 2 if name.endswith(".xlsx") else 1  # of a sheet, whose first row names the columns
    assert store.lines().tolist() == list(range(first, first + 200))


@pytest.mark.parametrize("name", FORMS)
def test_the_tools_read_the_rows(name: str, tmp_path: Path, minigpt: Any) -> None:
    FORMS[name](tmp_path / name, ROWS)
    nulls = 0 if name.endswith(".xlsx") else 1
    outcome = minigpt("data", "check", tmp_path, "--fix", tmp_path / "fixed.jsonl")
    assert f"{200 + nulls} rows checked: {nulls} error" in outcome.out
    fixed = (tmp_path / "fixed.jsonl").read_text("utf-8").splitlines()
    assert list(map(json.loads, fixed)) == ROWS
    assert "200 of chat" in minigpt("data", "stats", tmp_path / name).out


def test_a_sheet_may_hold_messages_and_other_names(tmp_path: Path) -> None:
    messages = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    other = {"chat": "messages", "history": "note"}
    cells = [messages, "[so"]
    for names, columns in ((("messages", "note"), {}), (("chat", "history"), other)):
        row = dict(zip(names, cells, strict=True))
        spreadsheet(tmp_path / "a.xlsx", [row])
        with (tmp_path / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([row.keys(), row.values()])
        for name in ("a.xlsx", "a.csv"):
            (read,) = read_records([tmp_path / name], "chat", BadRows(), columns=columns)
            assert read[0].messages[1].content == "b"


def test_a_folder_holds_them(tmp_path: Path) -> None:
    for name, write in FORMS.items():
        write(tmp_path / name, ROWS[:1])
    assert expand_files([str(tmp_path)]) == [str(tmp_path / name) for name in sorted(FORMS)]


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "rows.parquet"), ("openpyxl", "rows.xlsx")]
)
def test_a_missing_package_is_named(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FORMS[name](tmp_path / name, ROWS)
    for module in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{name}: .*{package}.*pip install 'minigpt\[tables\]'"):
        list(iter_rows(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "kind"), [("parquet", "a Parquet"), ("arrow", "an Arrow"), ("xlsx", "a spreadsheet")]
)
def test_a_damaged_file_is_named_for_what_it_is(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{name}"
    FORMS[path.name](path, ROWS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=f"cannot be read as {kind}"):
        list(iter_rows(path))


def test_what_is_compressed_around_is_named(tmp_path: Path) -> None:
    import gzip

    parquet(tmp_path / "rows.parquet", ROWS)
    packed = tmp_path / "rows.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "rows.parquet").read_bytes()))
    with pytest.raises(DataError, match="the file is a Parquet file"):
        list(iter_rows(packed))


def fill(path: Path, part: str, content: bytes) -> None:
    """Put something at the end of a part of a spreadsheet, inside its outermost element.

    openpyxl writes no table of strings, but reads one that is among the types.
    """
    with zipfile.ZipFile(path) as sound:
        parts = {name: sound.read(name) for name in sound.namelist()}
    head, end, tail = parts.get(part, b"<sst xmlns=%b></sst>" % MAIN).rpartition(b"</")
    parts[part] = head + content + end + tail
    if part == STRINGS:
        types = parts["[Content_Types].xml"]
        parts["[Content_Types].xml"] = types.replace(b"</Types>", STRINGS_TYPE + b"</Types>")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    "part", ["xl/sharedStrings.xml", "xl/styles.xml", "xl/worksheets/sheet1.xml"]
)
def test_a_spreadsheet_that_unpacks_to_too_much_is_refused(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "LARGEST_FILE", 100_000)
    monkeypatch.setattr(columnar, "LARGEST_SHEET", 100_000)
    path = tmp_path / "rows.xlsx"
    spreadsheet(path, ROWS[:1])
    assert list(iter_rows(path))
    fill(path, part, b" " * 2_000_000)
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=f"{part} unpacks to 2,00.* bytes, more than 100,000"):
        list(iter_rows(path))


@pytest.mark.parametrize(
    ("part", "content", "reason"),
    [
        (SHEET, b"<sheetData>" + INLINE % (b"x" * 200_000) + b"</sheetData>", "has more than 50,0"),
        (SHEET, b"<sheetData><row>" + b"<c/>" * 9000 + b"</row></sheetData>", "2,000 elements"),
        (SHEET, b"<sheetData>" + b"<row/>" * 9000 + b"</sheetData>", "7,000 elements"),
        (SHEET, b"<sheetData>" + (INLINE % b"x" + b" " * 900) * 200 + b"</sheetData>", "outside"),
        (STRINGS, b"<si><t>a</t></si>" * 4000, "7,000 elements"),
    ],
    ids=["cell", "cells", "rows", "space", "strings"],
)
def test_a_spreadsheet_of_which_too_much_would_be_kept_is_refused(
    part: str, content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.xlsx"
    spreadsheet(path, ROWS[:1])
    fill(path, part, content)
    for name, limit in [("LARGEST_FILE", 100_000), ("LARGEST_ROW", 50_000)]:
        monkeypatch.setattr(columnar, name, limit)
    for name, limit in [("ROW_ELEMENTS", 2000), ("PART_ELEMENTS", 7000)]:
        monkeypatch.setattr(columnar, name, limit)
    monkeypatch.setattr(columnar._Archive, "__init__", zipfile.ZipFile.__init__)
    with pytest.raises(DataError, match=reason):
        list(iter_rows(path))


def test_the_strings_of_a_spreadsheet_may_not_take_all_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "SECONDS", 0.05)
    spreadsheet(tmp_path / "rows.xlsx", ROWS[:1])
    fill(tmp_path / "rows.xlsx", STRINGS, b"<si><t>a</t></si>" * 200_000)
    with pytest.raises(DataError, match=r"after 0\.05 seconds of computing it is not done"):
        list(iter_rows(tmp_path / "rows.xlsx"))


def test_the_cells_of_a_row_may_share_one_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "LARGEST_ROW", 10_000)
    path = tmp_path / "rows.xlsx"
    spreadsheet(path, [dict.fromkeys("abcdef")])
    fill(path, STRINGS, b"<si><t>" + b"x" * 3000 + b"</t></si>")
    fill(path, SHEET, b"<sheetData><row>" + b'<c t="s"><v>0</v></c>' * 6 + b"</row></sheetData>")
    with pytest.raises(DataError, match=r"rows.xlsx:3: the row has more than 10,000 characters"):
        list(iter_rows(path))


def test_a_spreadsheet_with_entities_is_refused(tmp_path: Path) -> None:
    part = columnar._Part(io.BytesIO(b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'))
    with pytest.raises(DataError, match="declares entities"):
        part.read()


def test_rows_that_are_far_larger_than_their_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar, "LARGEST_ROWS", 1 << 18)
    parquet(tmp_path / "rows.parquet", [{"text": "x" * 50_000}] * 500, compression="zstd")
    assert (tmp_path / "rows.parquet").stat().st_size < 100_000
    with pytest.raises(DataError, match=r"rows.parquet:1: 8 rows have 4.* bytes"):
        list(iter_rows(tmp_path / "rows.parquet"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux")
@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_what_unpacks_to_more_than_the_memory_is_refused(name: str, tmp_path: Path) -> None:
    """In a process of its own, without Arrow's pool: memory that was free before does not count."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as files

    table = pyarrow.table({"text": ["x" * (200 << 20)]})
    path = tmp_path / name
    if name == "rows.parquet":
        files.write_table(table, path, compression="zstd", use_dictionary=False)
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
        with pyarrow.ipc.new_file(path, table.schema, options=options) as writer:
            writer.write_table(table)
    assert path.stat().st_size < 1_000_000
    code = (
        "import sys; from pathlib import Path\n"
        "from minigpt.data import columnar; from minigpt.data.formats import iter_rows\n"
        "columnar.LARGEST_BATCH = 64 << 20\n"
        "list(iter_rows(Path(sys.argv[1])))\n"
    )
    command = [sys.executable, "-c", code, path]
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    problem = f"DataError: {path}: a part of it unpacks to more than 67,108,864 bytes"
    assert problem in done.stderr


def test_one_value_that_stands_for_many_rows_takes_little_memory(tmp_path: Path) -> None:
    """A dictionary holds a value once, and each row that names it takes it whole."""
    parquet(tmp_path / "rows.parquet", [{"text": "x" * 1_000_000}] * 200, compression="zstd")
    code = (
        "import sys, pyarrow; from pathlib import Path\n"
        "from minigpt.data.formats import iter_rows\n"
        "rows = sum(1 for _ in iter_rows(Path(sys.argv[1])))\n"
        "print(rows, pyarrow.default_memory_pool().max_memory())"
    )
    command = [sys.executable, "-c", code, tmp_path / "rows.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, most = map(int, done.stdout.split())
    assert rows == 201
    assert most < 32_000_000


def test_a_sheet_whose_rows_have_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columnar, "SHEET_ROWS", 1000)
    spreadsheet(tmp_path / "a.xlsx", ROWS[:1])
    content = io.BytesIO((tmp_path / "a.xlsx").read_bytes())
    with zipfile.ZipFile(content) as sound, zipfile.ZipFile(tmp_path / "b.xlsx", "w") as archive:
        for name in sound.namelist():
            data = sound.read(name)
            archive.writestr(name, data.replace(b'<row r="2"', b'<row r="99999999999"'))
    with pytest.raises(DataError, match="holds no rows"):
        list(iter_rows(tmp_path / "b.xlsx"))


def test_a_large_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """Forty megabytes in one row group."""
    pyarrow = pytest.importorskip("pyarrow")
    import numpy as np
    from pyarrow import parquet as files

    rng = np.random.default_rng(0)
    texts = [rng.bytes(500).hex() for _ in range(40_000)]
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": texts})
    files.write_table(table, path, compression="none", row_group_size=10**6, use_dictionary=False)
    del table, texts
    code = (
        "import sys, pyarrow.parquet; from pathlib import Path\n"
        "from minigpt.machine import peak_memory; from minigpt.data.formats import iter_rows\n"
        "before = peak_memory()['peak_rss_mb']\n"
        "rows = sum(1 for _ in iter_rows(Path(sys.argv[1])))\n"
        "print(rows, peak_memory()['peak_rss_mb'] - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    rows, grown = map(int, done.stdout.split())
    assert (rows, done.returncode) == (40_000, 0)
    assert grown < 40


@damage.counts
@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.xlsx"])
def test_damaged_files_are_refused(name: str, tmp_path: Path, count: int) -> None:
    file = tmp_path / name
    FORMS[name](file, ROWS[:3])
    sound = file.read_bytes()

    def read(content: bytes) -> None:
        file.write_bytes(content)
        list(iter_rows(file))

    damage.assert_read_or_refused(count, damage.damaged_bytes(sound), read)
