"""Files of columns, made by the packages that also read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

Rows = Sequence[dict[str, Any]]


def parquet(path: Path, rows: Rows, **options: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([*rows, empty(rows)]), path, **options)


def arrow(path: Path, rows: Rows, stream: bool = False) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([*rows, empty(rows)])
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table)


def spreadsheet(path: Path, rows: Rows) -> None:
    """Write a sheet with a column that has no name."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append([*rows[0], None])
    for row in rows:
        book.active.append([*row.values(), "a note"])
    book.save(path)


def empty(rows: Rows) -> dict[str, None]:
    """A row in which each field is null."""
    return dict.fromkeys(rows[0])
